// The shared memory of a CTA. Every access is checked against its size and against other threads'
// accesses to the same bytes since the last barrier of the CTA: two that no barrier separates, one
// of them a write, are a race, whatever the order they happened to run in.
#pragma once

#include <cstdint>
#include <vector>

namespace quaver::ptx {

enum class Access : uint8_t { read, write, atomic };

class SharedMemory {
 public:
  // New contents, a pattern, for the next CTA.
  void start(uint64_t bytes);
  // Memory of `bytes` at `address`, for thread `thread`; an error where that is a race.
  unsigned char* access(uint64_t address, uint64_t bytes, Access kind, int thread);
  void barrier() { ++epoch_; }
  uint64_t size() const { return bytes_.size(); }

 private:
  static constexpr uint16_t kSeveral = 0xffff, kAtomic = 0xfffe;
  // The last accesses of a byte: between which barriers, and by whom.
  struct Shadow {
    uint32_t written = 0, read = 0;
    uint16_t writer = 0, reader = 0;
  };
  [[noreturn]] void race(uint64_t address, const Shadow& s, Access kind, int thread) const;

  std::vector<unsigned char> bytes_;
  std::vector<Shadow> shadow_;
  uint32_t epoch_ = 0;
};

}  // namespace quaver::ptx
