// The list of tensors of a multi-tensor op, on the device. It is passed as kernel arguments: no
// pinned memory is needed, no host memory has to outlive the call, and a captured graph holds the
// list by value.
#pragma once

#include "vector.h"

namespace quaver::cuda {

// Copies host bytes to 16-byte aligned device memory, rounded up to 16 bytes.
void upload(const char* op, void* to, const void* from, int64_t bytes, void* stream);

// Work is cut into chunks, numbered through all tensors; entry i owns [first, next entry's first).
// Returns the owner of `chunk`, skipping entries that own none.
template <class Entry>
QUAVER_DEVICE int64_t owner_of(const Entry* table, int64_t count, int64_t chunk) {
  int64_t low = 0, high = count;  // the owner is in [low, high)
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (table[middle].first <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// What every warp of a block reads again and again, in shared memory: of the table, say.
template <class T>
struct alignas(16) Held {
  static_assert(alignof(T) <= 16 && sizeof(T) % 4 == 0 && sizeof(T) / 4 <= kThreads, "words");
  uint32_t word[sizeof(T) / 4];
};

// All threads of the block call it, and synchronise before the first use.
template <class T>
QUAVER_DEVICE void hold(Held<T>& held, const T& from) {
  if (threadIdx.x < sizeof(T) / 4)
    held.word[threadIdx.x] = reinterpret_cast<const uint32_t*>(&from)[threadIdx.x];
}

template <class T>
QUAVER_DEVICE const T& of(const Held<T>& held) {
  return *reinterpret_cast<const T*>(held.word);
}

}  // namespace quaver::cuda
