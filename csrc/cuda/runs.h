// A thread's 16 elements lie in runs of up to 16 bytes, between which lie the runs of its
// neighbours. Each access of a warp is then dense; 16 elements in a row would leave a gap between
// the 16 bytes of one thread and those of the next, and every sector would be requested twice.
#pragma once

#include "vector.h"

namespace quaver::cuda {

// The elements of a run in a kernel whose widest type has `size` bytes.
constexpr int run_length(int size) { return kVector / size; }

// The distance of element j from a thread's first, where runs begin `apart` elements from each
// other.
template <int kRun>
QUAVER_DEVICE int64_t place_in_runs(int j, int64_t apart) {
  return j / kRun * apart + j % kRun;
}

// Zeros behind n elements of runs.
template <int kRun>
QUAVER_DEVICE void mask_runs(float (&x)[kVector], int64_t apart, int64_t n) {
  if (n > place_in_runs<kRun>(kVector - 1, apart)) return;
#pragma unroll
  for (int j = 0; j < kVector; ++j) x[j] = place_in_runs<kRun>(j, apart) < n ? x[j] : 0.0f;
}

template <int kWords>
QUAVER_DEVICE void load_words(const void* from, uint32_t* word) {
  if constexpr (kWords > 4) {  // a wider type than the kernel's widest that was foreseen
    load_words<4>(from, word);
    load_words<kWords - 4>(static_cast<const uint4*>(from) + 1, word + 4);
  } else if constexpr (kWords == 1) {
    word[0] = *static_cast<const uint32_t*>(from);
  } else if constexpr (kWords == 2) {
    const uint2 w = *static_cast<const uint2*>(from);
    word[0] = w.x;
    word[1] = w.y;
  } else {
    const uint4 w = *static_cast<const uint4*>(from);
    word[0] = w.x;
    word[1] = w.y;
    word[2] = w.z;
    word[3] = w.w;
  }
}

template <int kWords>
QUAVER_DEVICE void store_words(void* to, const uint32_t* word) {
  if constexpr (kWords > 4) {
    store_words<4>(to, word);
    store_words<kWords - 4>(static_cast<uint4*>(to) + 1, word + 4);
  } else if constexpr (kWords == 1)
    *static_cast<uint32_t*>(to) = word[0];
  else if constexpr (kWords == 2)
    *static_cast<uint2*>(to) = uint2{word[0], word[1]};
  else
    *static_cast<uint4*>(to) = uint4{word[0], word[1], word[2], word[3]};
}

// One store to global memory. nvcc makes words of a vector's store where it steps the pointer of a
// loop by a sum. For buffers that the kernel does not read, so that it need not see the store.
template <int kWords>
QUAVER_DEVICE void store_at_once(void* to, const uint32_t* word) {
#if defined(__CUDA_ARCH__)
  [[maybe_unused]] const size_t at = __cvta_generic_to_global(to);
  if constexpr (kWords > 4) {
    store_at_once<4>(to, word);
    store_at_once<kWords - 4>(static_cast<uint4*>(to) + 1, word + 4);
  } else if constexpr (kWords == 4)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(word[0]), "r"(word[1]),
                 "r"(word[2]), "r"(word[3]));
  else if constexpr (kWords == 2)
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(word[0]), "r"(word[1]));
  else
#endif
    store_words<kWords>(to, word);
}

// An unsigned integer of an element's size.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t,
                                std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>;

// Loads a thread's elements, with zeros behind the n that there are from `from` on. Single elements
// are read at edges and of odd views.
template <int kRun, class T>
QUAVER_DEVICE Packed<sizeof(T)> load_runs(const T* from, int64_t apart, int64_t n, bool aligned) {
  constexpr int kRuns = kVector / kRun, kWords = kRun * int(sizeof(T)) / 4;
  constexpr int per_word = 4 / int(sizeof(T));
  Packed<sizeof(T)> v = {};
  if (aligned && n > place_in_runs<kRun>(kVector - 1, apart)) {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) load_words<kWords>(from + r * apart, v.word + r * kWords);
    return v;
  }
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const int64_t left = n - r * apart;
    if (aligned && left >= kRun) {
      load_words<kWords>(from + r * apart, v.word + r * kWords);
      continue;
    }
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      if (k >= left) continue;
      const int j = r * kRun + k;
      v.word[j / per_word] |= uint32_t(reinterpret_cast<const Bits<T>*>(from)[r * apart + k])
                              << j % per_word * (32 / per_word);
    }
  }
  return v;
}

template <int kRun, class T>
QUAVER_DEVICE void store_runs(T* to, const Packed<sizeof(T)>& v, int64_t apart, int64_t n,
                              bool aligned) {
  constexpr int kRuns = kVector / kRun, kWords = kRun * int(sizeof(T)) / 4;
  constexpr int per_word = 4 / int(sizeof(T));
  if (aligned && n > place_in_runs<kRun>(kVector - 1, apart)) {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) store_words<kWords>(to + r * apart, v.word + r * kWords);
    return;
  }
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const int64_t left = n - r * apart;
    if (aligned && left >= kRun) {
      store_words<kWords>(to + r * apart, v.word + r * kWords);
      continue;
    }
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      if (k >= left) continue;
      const int j = r * kRun + k;
      reinterpret_cast<Bits<T>*>(to)[r * apart + k] =
          static_cast<Bits<T>>(v.word[j / per_word] >> j % per_word * (32 / per_word));
    }
  }
}

}  // namespace quaver::cuda
