// Global memory that kernels may touch: what was allocated in this process, and its stack.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <string>

namespace quaver::ptx {

// An allocator that does not call operator new, which the registry of allocations replaces.
template <class T>
struct Malloc {
  using value_type = T;
  Malloc() = default;
  template <class U> Malloc(const Malloc<U>&) {}
  T* allocate(size_t n) {
    if (void* memory = std::malloc(n * sizeof(T))) return static_cast<T*>(memory);
    std::abort();
  }
  void deallocate(T* memory, size_t) { std::free(memory); }
  template <class U> bool operator==(const Malloc<U>&) const { return true; }
  template <class U> bool operator!=(const Malloc<U>&) const { return false; }
};

struct Range {
  uint64_t first = 1, end = 0;
  bool writable = false;
  bool holds(uint64_t address, uint64_t bytes) const {
    return address >= first && address <= end && bytes <= end - address;
  }
};

class Memory {
 public:
  void add(const void* start, size_t bytes, bool writable = true);
  void remove(const void* start);
  // Of the block that holds it, kernels may touch this part alone.
  void narrow(const void* start, size_t bytes);
  // The range that holds `address`, or an empty one.
  Range find(uint64_t address) const;
  // What lies around an address, for errors.
  std::string describe(uint64_t address) const;

 private:
  using Blocks =
      std::map<uint64_t, Range, std::less<uint64_t>, Malloc<std::pair<const uint64_t, Range>>>;
  Blocks::const_iterator block_below(uint64_t address) const;
  Blocks blocks_;  // by where they were allocated
};

}  // namespace quaver::ptx
