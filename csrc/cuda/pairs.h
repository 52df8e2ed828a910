// Sixteen elements in a row a thread, of 2 bytes: each access of 16 bytes would leave a gap between
// one thread and the next, and ask for every sector twice. Two neighbours instead load and store
// the 16-byte halves of one of them together, and exchange those that are the other's.
#pragma once

#include "runtime_type.h"

namespace quaver::cuda {

// Exchanges halves: of {first, second} of each thread to {first of both, second of both} by the
// even thread and the odd, and back. All threads of a warp must call it.
QUAVER_DEVICE void exchange_halves(uint32_t (&word)[16]) {
  const bool odd = (threadIdx.x & 1) != 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t first = word[w], second = word[w + 4];
    const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? first : second, 1);
    word[w] = odd ? other : first;
    word[w + 4] = odd ? second : other;
  }
}

// The first half that a thread accesses for itself and its neighbour; the other is two behind.
template <class T>
QUAVER_DEVICE T* half_of_pair(T* halves) {
  return halves - (threadIdx.x & 1);
}

// load_any, where `whole` says that all elements of the warp's threads are there and aligned.
QUAVER_DEVICE AnyPacked load_paired(const void* p, DType type, int64_t i, int64_t n, bool aligned,
                                    bool whole) {
  if (!whole || size_of(type) != 2) return load_any(p, type, i, n, aligned);
  const uint4* from =
      half_of_pair(reinterpret_cast<const uint4*>(static_cast<const char*>(p) + 2 * i));
  const uint4 a = from[0], b = from[2];
  AnyPacked v = {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
  exchange_halves(v.word);
  return v;
}

QUAVER_DEVICE void store_paired(void* p, DType type, int64_t i, AnyPacked v, int64_t n,
                                bool aligned, bool whole) {
  const int64_t size = size_of(type);
  char* to = static_cast<char*>(p) + i * size;
  if (!whole || size != 2) return store(to, v, int(size), n, aligned);
  exchange_halves(v.word);
  uint4* half = half_of_pair(reinterpret_cast<uint4*>(to));
  half[0] = uint4{v.word[0], v.word[1], v.word[2], v.word[3]};
  half[2] = uint4{v.word[4], v.word[5], v.word[6], v.word[7]};
}

}  // namespace quaver::cuda
