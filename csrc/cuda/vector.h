// Device functions that the memory-bound kernels share: vectors of 16 elements in registers, their
// conversions, and reductions. The conversions give the bits of fp8.h; where the machine has an
// instruction with those bits they use it, because integer arithmetic alone is slower than the
// memory.
#pragma once

#include "launch.h"
#include "quaver/fp8.h"
#include "quaver/philox.h"
#include "quaver/scale.h"
#include "quaver/tensor_view.h"

namespace quaver::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kVector = 16;  // elements a thread handles at once: one 16-byte access of FP8
constexpr int64_t kBlockSpan = int64_t(kThreads) * kVector;
constexpr unsigned kAllLanes = 0xffffffffu;

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

QUAVER_DEVICE uint32_t max_bits(uint32_t a, uint32_t b) { return a < b ? b : a; }
[[maybe_unused]] QUAVER_DEVICE uint32_t min_bits(uint32_t a, uint32_t b) { return a < b ? a : b; }
QUAVER_DEVICE uint32_t magnitude_bits(float x) { return bit_cast<uint32_t>(x) & 0x7fffffffu; }

// Up to kVector elements of kSize bytes as they lie in memory.
template <int kSize>
struct Packed {
  uint32_t word[4 * kSize];
};

// Loads n <= kVector elements of `size` <= kSize bytes, with zeros behind them. It reads 16 bytes
// at a time where the vector is whole and aligned, and single elements at edges and of odd views.
template <int kSize>
QUAVER_DEVICE Packed<kSize> load(const void* from, int size, int64_t n, bool aligned) {
  Packed<kSize> v;
#pragma unroll
  for (int w = 0; w < 4 * kSize; ++w) v.word[w] = 0;
  if (aligned && n >= kVector) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      if (k >= size) continue;
      const uint4 part = static_cast<const uint4*>(from)[k];
      v.word[4 * k] = part.x;
      v.word[4 * k + 1] = part.y;
      v.word[4 * k + 2] = part.z;
      v.word[4 * k + 3] = part.w;
    }
    return v;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i >= n) continue;
    if (kSize >= 4 && size == 4)
      v.word[i % (4 * kSize)] = static_cast<const uint32_t*>(from)[i];
    else if (kSize >= 2 && size == 2)
      v.word[i / 2 % (4 * kSize)] |= uint32_t(static_cast<const uint16_t*>(from)[i]) << i % 2 * 16;
    else if (size == 1)
      v.word[i / 4] |= uint32_t(static_cast<const uint8_t*>(from)[i]) << i % 4 * 8;
  }
  return v;
}

template <int kSize>
QUAVER_DEVICE void store(void* to, const Packed<kSize>& v, int size, int64_t n, bool aligned) {
  if (aligned && n >= kVector) {
#pragma unroll
    for (int k = 0; k < kSize; ++k)
      if (k < size)
        static_cast<uint4*>(to)[k] =
            uint4{v.word[4 * k], v.word[4 * k + 1], v.word[4 * k + 2], v.word[4 * k + 3]};
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i >= n) continue;
    if (kSize >= 4 && size == 4)
      static_cast<uint32_t*>(to)[i] = v.word[i % (4 * kSize)];
    else if (kSize >= 2 && size == 2)
      static_cast<uint16_t*>(to)[i] =
          static_cast<uint16_t>(v.word[i / 2 % (4 * kSize)] >> i % 2 * 16);
    else if (size == 1)
      static_cast<uint8_t*>(to)[i] = static_cast<uint8_t>(v.word[i / 4] >> i % 4 * 8);
  }
}

// Values of one word; f16 and FP8 by fp8.h where there is no instruction.
QUAVER_DEVICE void decode_word(float, uint32_t word, float* x) { x[0] = bit_cast<float>(word); }

QUAVER_DEVICE void decode_word(bf16, uint32_t word, float* x) {
  x[0] = bit_cast<float>(word << 16);
  x[1] = bit_cast<float>(word & 0xffff0000u);
}

QUAVER_DEVICE void decode_word(f16, uint32_t word, float* x) {
#if defined(__CUDA_ARCH__)
  asm("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}"
      : "=f"(x[0]), "=f"(x[1])
      : "r"(word));
#else
  x[0] = decode(f16{static_cast<uint16_t>(word)});
  x[1] = decode(f16{static_cast<uint16_t>(word >> 16)});
#endif
}

template <class T>
QUAVER_DEVICE void decode_word(T, uint32_t word, float* x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t low, high;
  if (Format<T>::mantissa == 3)
    asm("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %2; cvt.rn.f16x2.e4m3x2 %0, lo; "
        "cvt.rn.f16x2.e4m3x2 %1, hi;}"
        : "=r"(low), "=r"(high)
        : "r"(word));
  else
    asm("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %2; cvt.rn.f16x2.e5m2x2 %0, lo; "
        "cvt.rn.f16x2.e5m2x2 %1, hi;}"
        : "=r"(low), "=r"(high)
        : "r"(word));
  decode_word(f16{}, low, x);
  decode_word(f16{}, high, x + 2);
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = decode(T{static_cast<uint8_t>(word >> 8 * i)});
#endif
}

template <class T, int kSize>
QUAVER_DEVICE void decode_vector(const Packed<kSize>& v, float (&x)[kVector]) {
  constexpr int per_word = 4 / sizeof(T);
#pragma unroll
  for (int w = 0; w < kVector / per_word; ++w) decode_word(T{}, v.word[w], x + w * per_word);
}

// Encodes one word's values by fp8.h.
template <class T>
QUAVER_DEVICE uint32_t encode_word(const float* x) {
  if constexpr (sizeof(T) == 4) {
    return bit_cast<uint32_t>(x[0]);
  } else {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < int(4 / sizeof(T)); ++i)
      word |= uint32_t(encode_nearest<T>(x[i]).bits) << (32 / (4 / sizeof(T)) * i);
    return word;
  }
}

template <class T>
constexpr uint32_t nan_code() {
  if constexpr (std::is_same<T, bf16>::value)
    return 0x7fffu;
  else
    return Format<T>::nan_code;
}

#if defined(__CUDA_ARCH__)
// Encodes one word's values by instructions; none of them may be NaN.
template <class T>
QUAVER_DEVICE uint32_t convert_finite_word(const float* x) {
  [[maybe_unused]] uint32_t word;
  if constexpr (std::is_same<T, f16>::value) {
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(x[1]), "f"(x[0]));
    return word;
  } else if constexpr (std::is_same<T, bf16>::value) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(x[1]), "f"(x[0]));
    return word;
#if __CUDA_ARCH__ >= 890
  } else if constexpr (std::is_same<T, e4m3>::value) {
    asm("{.reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, %2, %1; "
        "cvt.rn.satfinite.e4m3x2.f32 hi, %4, %3; mov.b32 %0, {lo, hi};}"
        : "=r"(word)
        : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
    return word;
  } else if constexpr (std::is_same<T, e5m2>::value) {
    asm("{.reg .b16 lo, hi; cvt.rn.satfinite.e5m2x2.f32 lo, %2, %1; "
        "cvt.rn.satfinite.e5m2x2.f32 hi, %4, %3; mov.b32 %0, {lo, hi};}"
        : "=r"(word)
        : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
    return word;
#endif
  } else {
    return encode_word<T>(x);
  }
}
#else
template <class T>
QUAVER_DEVICE uint32_t convert_finite_word(const float* x) {
  return encode_word<T>(x);
}
#endif

// Encodes one word's values, nearest. The hardware's NaN codes are not specified for every format,
// so they are put in place of zeros.
template <class T>
QUAVER_DEVICE uint32_t convert_word(const float* x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) < 4) {
    constexpr int count = 4 / int(sizeof(T));
    bool any = false;
#pragma unroll
    for (int i = 0; i < count; ++i) any = any | (x[i] != x[i]);
    if (!any) return convert_finite_word<T>(x);
    float number[count];
    uint32_t nan = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      number[i] = x[i] == x[i] ? x[i] : 0.0f;
      nan |= x[i] == x[i] ? 0u : uint32_t(nan_code<T>()) << 32 / count * i;
    }
    return convert_finite_word<T>(number) | nan;
  }
#endif
  return encode_word<T>(x);
}

// Whether one of the values is NaN: one comparison finds it in two.
template <int kCount>
QUAVER_DEVICE bool has_nan(const float (&x)[kCount]) {
  bool nan = false;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) nan = nan | (x[i] != x[i]) | (x[i + 1] != x[i + 1]);
  return nan;
}

// Encodes values of which the caller knows whether all are numbers.
template <class T, int kSize>
QUAVER_DEVICE void encode_vector(const float (&x)[kVector], Packed<kSize>& v,
                                 [[maybe_unused]] bool numbers) {
  constexpr int count = kVector * int(sizeof(T)) / 4, per_word = 4 / int(sizeof(T));
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int w = 0; w < count; ++w) v.word[w] = convert_finite_word<T>(x + w * per_word);
  if (numbers) return;
#endif
#pragma unroll
  for (int w = 0; w < count; ++w) v.word[w] = convert_word<T>(x + w * per_word);
}

template <class T, int kSize>
QUAVER_DEVICE void encode_vector(const float (&x)[kVector], Packed<kSize>& v) {
  encode_vector<T>(x, v, sizeof(T) == 4 || !has_nan(x));
}

QUAVER_DEVICE bool is_number(uint32_t magnitude) { return magnitude <= 0x7f800000u; }

// Bits of the largest magnitude, every NaN above infinity. The instruction that compares magnitudes
// makes one NaN of all; where there is none for it, the bits keep theirs.
template <int kCount>
QUAVER_DEVICE uint32_t amax_bits(const float (&x)[kCount]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
  float most = x[0];  // its sign means nothing
#pragma unroll
  for (int i = 1; i < kCount; ++i)
    asm("max.NaN.xorsign.abs.f32 %0, %0, %1;" : "+f"(most) : "f"(x[i]));
  return min_bits(magnitude_bits(most), 0x7fc00000u);
#else
  uint32_t result = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) result = max_bits(result, magnitude_bits(x[i]));
  return result;
#endif
}

// The division by a scale: a multiplication where the reciprocal is exact.
struct Divisor {
  float factor;
  bool divide;
  bool sound;  // makes no NaN of a number
};

QUAVER_DEVICE Divisor divisor(float scale) {
  const bool exact = is_power_of_two(scale);
  return {exact ? 1.0f / scale : scale, !exact, scale != 0.0f && is_finite(scale)};
}

QUAVER_DEVICE void divide(float (&x)[kVector], Divisor d) {
  if (d.divide) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = x[i] / d.factor;
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] *= d.factor;
}

// Maximum over a block, in thread 0. All threads must call it.
QUAVER_DEVICE uint32_t block_max(uint32_t value) {
  __shared__ uint32_t warps[kThreads / kWarp];
  value = __reduce_max_sync(kAllLanes, value);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kThreads / kWarp; ++w) value = max_bits(value, warps[w]);
  __syncthreads();  // `warps` may be used again
  return value;
}

// One atomic per block; maxima are exact, so their order does not matter.
QUAVER_DEVICE void block_atomic_max(float* amax, uint32_t value) {
  value = block_max(value);
  if (threadIdx.x == 0 && value != 0) atomicMax(reinterpret_cast<uint32_t*>(amax), value);
}

}  // namespace quaver::cuda
