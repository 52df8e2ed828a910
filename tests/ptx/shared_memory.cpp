#include "shared_memory.h"

#include <algorithm>
#include <string>

#include "quaver/check.h"

namespace quaver::ptx {

void SharedMemory::start(uint64_t bytes, int threads, bool barriers_alone) {
  constexpr unsigned char kPattern = 0xcd;
  bytes_.assign(bytes, kPattern);
  held_.clear();
  pending_.assign(barriers_alone ? bytes : 0, 0);
  fences_.assign(barriers_alone ? 0 : threads, 0);
  written_.assign(barriers_alone ? 0 : bytes, Written{});
  if (!barriers_alone) {
    shadow_.clear();
  } else if (shadow_.size() != bytes || epoch_ > (1u << 31)) {
    shadow_.assign(bytes, Shadow{});
    epoch_ = 0;
  }
  ++epoch_;
}

void SharedMemory::check_bounds(uint64_t address, uint64_t bytes) const {
  if (address > bytes_.size() || bytes > bytes_.size() - address)
    fail("byte ", address, " of ", bytes_.size(), " bytes of shared memory");
}

unsigned char* SharedMemory::access(uint64_t address, uint64_t bytes, Access kind, int thread) {
  check_bounds(address, bytes);
  if (!shadow_.empty()) {
    check_pending(address, bytes, kind);
    check_race(address, bytes, kind, thread);
  } else if (!written_.empty()) {
    check_held(address, bytes, kind);
    if (kind != Access::read)
      for (uint64_t i = address; i < address + bytes; ++i)
        written_[i] = {static_cast<uint16_t>(thread), fences_[thread]};
  }
  return bytes_.data() + address;
}

void SharedMemory::check_race(uint64_t address, uint64_t bytes, Access kind, int thread) {
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
}

void SharedMemory::check_pending(uint64_t address, uint64_t bytes, Access kind) const {
  const auto first = pending_.begin() + static_cast<int64_t>(address);
  if (std::find(first, first + static_cast<int64_t>(bytes), 1) == first + int64_t(bytes)) return;
  fail("a race: bytes ", address, " to ", address + bytes - 1, " of shared memory are ",
       kind == Access::read ? "read" : "written",
       " before the end of an asynchronous write of a thread");
}

void SharedMemory::begin_copy(uint64_t address, uint64_t bytes, int thread) {
  if (shadow_.empty()) return hold(address, bytes, Access::write);
  access(address, bytes, Access::write, thread);
  std::fill_n(pending_.begin() + static_cast<int64_t>(address), bytes, uint8_t(1));
}

unsigned char* SharedMemory::end_copy(uint64_t address, uint64_t bytes, int thread) {
  if (shadow_.empty())
    release(address, bytes, Access::write);
  else
    std::fill_n(pending_.begin() + static_cast<int64_t>(address), bytes, uint8_t(0));
  return access(address, bytes, Access::write, thread);
}

unsigned char* SharedMemory::copy(uint64_t address, uint64_t bytes, Access kind) {
  check_bounds(address, bytes);
  if (kind == Access::read) check_fenced(address, bytes);
  if (kind == Access::write)
    for (uint64_t i = address; i < address + bytes; ++i) written_[i].writer = kNobody;
  return bytes_.data() + address;
}

void SharedMemory::check_fenced(uint64_t address, uint64_t bytes) const {
  for (uint64_t i = address; i < address + bytes; ++i) {
    const Written& w = written_[i];
    if (w.writer != kNobody && w.fences == fences_[w.writer])
      fail("the async proxy reads byte ", i, " of shared memory, which thread ", w.writer,
           " wrote, with no fence.proxy.async after it");
  }
}

void SharedMemory::hold(uint64_t address, uint64_t bytes, Access kind) {
  check_bounds(address, bytes);
  check_held(address, bytes, kind);
  held_.push_back({address, address + bytes, kind});
}

void SharedMemory::release(uint64_t address, uint64_t bytes, Access kind) {
  const auto found = std::find_if(held_.begin(), held_.end(), [=](const Held& h) {
    return h.first == address && h.end == address + bytes && h.kind == kind;
  });
  if (found == held_.end()) fail("shared memory at ", address, " is not held");
  *found = held_.back();
  held_.pop_back();
}

void SharedMemory::check_held(uint64_t address, uint64_t bytes, Access kind) const {
  for (const Held& h : held_)
    if (address < h.end && address + bytes > h.first &&
        (kind != Access::read || h.kind != Access::read))
      fail("a race: bytes ", address, " to ", address + bytes - 1, " of shared memory are ",
           kind == Access::read ? "read" : "written", " before the end of an asynchronous ",
           h.kind == Access::read ? "read" : "write", " of bytes ", h.first, " to ", h.end - 1);
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
