#include "shared_memory.h"

#include <algorithm>
#include <string>

#include "quaver/check.h"

namespace quaver::ptx {

void SharedMemory::start(uint64_t bytes) {
  constexpr unsigned char kPattern = 0xcd;
  bytes_.assign(bytes, kPattern);
  if (shadow_.size() != bytes || epoch_ > (1u << 31)) {
    shadow_.assign(bytes, Shadow{});
    epoch_ = 0;
  }
  ++epoch_;
}

unsigned char* SharedMemory::access(uint64_t address, uint64_t bytes, Access kind, int thread) {
  if (address > bytes_.size() || bytes > bytes_.size() - address)
    fail("byte ", address, " of ", bytes_.size(), " bytes of shared memory");
  const auto self = static_cast<uint16_t>(thread);
  const uint16_t who = kind == Access::atomic ? kAtomic : self;
  for (Shadow* s = &shadow_[address]; s < &shadow_[address] + bytes; ++s) {
    const bool written = s->written == epoch_ && s->writer != who && s->writer != self;
    const bool read = kind != Access::read && s->read == epoch_ && s->reader != self;
    if (written || read) race(s - shadow_.data(), *s, kind, thread);
    if (kind == Access::read) {
      s->reader = s->read == epoch_ && s->reader != who ? kSeveral : who;
      s->read = epoch_;
    } else {
      s->writer = who;
      s->written = epoch_;
    }
  }
  return bytes_.data() + address;
}

void SharedMemory::race(uint64_t address, const Shadow& s, Access kind, int thread) const {
  const auto name = [](uint16_t who) {
    if (who == kAtomic) return std::string("an atomic");
    return who == kSeveral ? std::string("several threads") : "thread " + std::to_string(who);
  };
  const bool written = s.written == epoch_;
  fail("a race: thread ", thread, kind == Access::read ? " reads" : " writes", " byte ", address,
       " of shared memory, which ", name(written ? s.writer : s.reader),
       written ? " wrote" : " read", ", with no barrier between");
}

}  // namespace quaver::ptx
