// Sixteen elements in a row a thread, of 2 or 4 bytes: each access of 16 bytes would leave a gap
// between one thread and the next, and ask for every sector twice. Two neighbours instead load and
// store the 16-byte halves of one sector together, and exchange those that are the other's.
#pragma once

#include "runs.h"
#include "runtime_type.h"

namespace quaver::cuda {

// Exchanges halves of sectors: of {first, second} of each thread to {first of both, second of both}
// by the even thread and the odd, and back. All threads of a warp must call it.
template <int kSectors>
QUAVER_DEVICE void exchange_halves(uint32_t (&word)[16]) {
  const bool odd = (threadIdx.x & 1) != 0;
#pragma unroll
  for (int w = 0; w < 8 * kSectors; ++w) {
    if (w % 8 >= 4) continue;
    const uint32_t first = word[w], second = word[w + 4];
    const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? first : second, 1);
    word[w] = odd ? other : first;
    word[w + 4] = odd ? second : other;
  }
}

// The first half that a thread of `kSectors` accesses for itself and its neighbour, whose half of
// the same sector is 2 * kSectors behind.
template <int kSectors, class T>
QUAVER_DEVICE T* half_of_pair(T* halves) {
  return halves - (threadIdx.x & 1) * (2 * kSectors - 1);
}

template <int kSectors>
QUAVER_DEVICE AnyPacked load_sectors(const void* p) {
  const uint4* from = half_of_pair<kSectors>(static_cast<const uint4*>(p));
  AnyPacked v = {};
#pragma unroll
  for (int s = 0; s < kSectors; ++s) {
    load_words<4>(from + 2 * s, v.word + 8 * s);
    load_words<4>(from + 2 * s + 2 * kSectors, v.word + 8 * s + 4);
  }
  exchange_halves<kSectors>(v.word);
  return v;
}

template <int kSectors>
QUAVER_DEVICE void store_sectors(void* p, AnyPacked v) {
  exchange_halves<kSectors>(v.word);
  uint4* to = half_of_pair<kSectors>(static_cast<uint4*>(p));
#pragma unroll
  for (int s = 0; s < kSectors; ++s) {
    store_words<4>(to + 2 * s, v.word + 8 * s);
    store_words<4>(to + 2 * s + 2 * kSectors, v.word + 8 * s + 4);
  }
}

// load_any, where `whole` says that all elements of the warp's threads are there and aligned.
QUAVER_DEVICE AnyPacked load_paired(const void* p, DType type, int64_t i, int64_t n, bool aligned,
                                    bool whole) {
  const int64_t size = size_of(type);
  const char* from = static_cast<const char*>(p) + i * size;
  if (whole && size == 2) return load_sectors<1>(from);
  if (whole && size == 4) return load_sectors<2>(from);
  return load_any(p, type, i, n, aligned);
}

QUAVER_DEVICE void store_paired(void* p, DType type, int64_t i, const AnyPacked& v, int64_t n,
                                bool aligned, bool whole) {
  const int64_t size = size_of(type);
  char* to = static_cast<char*>(p) + i * size;
  if (whole && size == 2) return store_sectors<1>(to, v);
  if (whole && size == 4) return store_sectors<2>(to, v);
  store(to, v, int(size), n, aligned);
}

}  // namespace quaver::cuda
