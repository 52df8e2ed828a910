// The shared memory of a CTA. Every access is checked against its size and against other threads'
// accesses to the same bytes since the last barrier of the CTA: two that no barrier separates, one
// of them a write, are a race, whatever the order they happened to run in. Of kernels with
// mbarriers it checks accesses against asynchronous copies instead: none may touch bytes that one
// is to write or to read, and a copy may not read what a thread wrote without a proxy fence. A copy
// that its own thread waits for (cp.async.wait_group) is a write of that thread, which nobody may
// see before; barriers alone order what follows.
#pragma once

#include <cstdint>
#include <vector>

namespace quaver::ptx {

enum class Access : uint8_t { read, write, atomic };

class SharedMemory {
 public:
  // New contents, a pattern, for the next CTA.
  void start(uint64_t bytes, int threads, bool barriers_alone);
  // Memory of `bytes` at `address`, for thread `thread`; an error where that is a race.
  unsigned char* access(uint64_t address, uint64_t bytes, Access kind, int thread);
  void barrier() { ++epoch_; }
  uint64_t size() const { return bytes_.size(); }

  // The same for the asynchronous proxy, of copies and of products.
  unsigned char* copy(uint64_t address, uint64_t bytes, Access kind);
  void fence_proxy(int thread) {
    if (!fences_.empty()) ++fences_[thread];
  }
  void check_fenced(uint64_t address, uint64_t bytes) const;
  // From now on a copy may access these bytes, until it is released.
  void hold(uint64_t address, uint64_t bytes, Access kind);
  void release(uint64_t address, uint64_t bytes, Access kind);
  void check_held(uint64_t address, uint64_t bytes, Access kind) const;
  // A thread's own copy, from its start to its end, where it lands.
  void begin_copy(uint64_t address, uint64_t bytes, int thread);
  unsigned char* end_copy(uint64_t address, uint64_t bytes, int thread);

 private:
  static constexpr uint16_t kSeveral = 0xffff, kAtomic = 0xfffe, kNobody = 0xfffd;
  // The last accesses of a byte: between which barriers, and by whom.
  struct Shadow {
    uint32_t written = 0, read = 0;
    uint16_t writer = 0, reader = 0;
  };
  // The thread that wrote a byte last, and how many proxy fences it had executed.
  struct Written {
    uint16_t writer = kNobody;
    uint32_t fences = 0;
  };
  struct Held {
    uint64_t first, end;
    Access kind;
  };
  void check_bounds(uint64_t address, uint64_t bytes) const;
  void check_pending(uint64_t address, uint64_t bytes, Access kind) const;
  void check_race(uint64_t address, uint64_t bytes, Access kind, int thread);
  [[noreturn]] void race(uint64_t address, const Shadow& s, Access kind, int thread) const;

  std::vector<unsigned char> bytes_;
  std::vector<Shadow> shadow_;
  std::vector<uint8_t> pending_;  // bytes that threads' copies are to write
  std::vector<Written> written_;
  std::vector<uint32_t> fences_;  // of each thread
  std::vector<Held> held_;
  uint32_t epoch_ = 0;
};

}  // namespace quaver::ptx
