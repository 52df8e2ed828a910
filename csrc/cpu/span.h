// Spans of values to f32 and back: the conversions that every vector loop begins and ends with.
// First in plain C++ for any type and machine, then by hand where an instruction set has something
// better for f16 and FP8 (registers.h). All give the bits of include/quaver/fp8.h.
//
// For simd*.cpp only, which are compiled once per instruction set.
#pragma once

#include <type_traits>

#include "registers.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

#define QUAVER_SIMD _Pragma("omp simd")

// Prefetches 4 KiB ahead of a stream: the loops here end every few hundred values, where the
// hardware's own prefetch starts anew. Beyond the end of the data it does nothing.
inline void prefetch(const void* p) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + 4096));
}

// Prefetches ahead of a whole range of bytes.
inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch(static_cast<const char*>(p) + i);
}

// Prefetches the block of as many bytes behind this one.
inline void prefetch_next(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(static_cast<const char*>(p) + bytes + i);
}

// Prefetches 64 KiB ahead into the second-level cache, for a loop that reads one stream and is
// bound by the latency of memory.
inline void prefetch_far(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + 65536 + i), 0,
                       2);
}

template <class T>
inline void load(float* __restrict out, const T* __restrict x, int64_t n, float scale) {
  QUAVER_SIMD
  for (int64_t i = 0; i < n; ++i) out[i] = TensorCodec<T>::decode(x[i], scale);
}

template <class T>
inline void store(T* __restrict out, const float* __restrict x, int64_t n, float inverse_scale) {
  QUAVER_SIMD
  for (int64_t i = 0; i < n; ++i) out[i] = TensorCodec<T>::encode(x[i], inverse_scale);
}

template <class T>
inline void store_divided(T* __restrict out, const float* __restrict x, int64_t n, float scale) {
  QUAVER_SIMD
  for (int64_t i = 0; i < n; ++i) out[i] = encode_nearest<T>(x[i] / scale);
}

#if defined(__AVX512F__)
// The same bits as fp8.h's f16: saturate and make NaN canonical around the instruction, which does
// neither.
template <>
inline void load<f16>(float* __restrict out, const f16* __restrict x, int64_t n, float scale) {
  int64_t i = 0;
  const __m512 s = _mm512_set1_ps(scale);
  for (; i + 16 <= n; i += 16) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_cvtph_ps(h), s));
  }
  for (; i < n; ++i) out[i] = TensorCodec<f16>::decode(x[i], scale);
}

inline void store_f16(f16* __restrict out, const float* __restrict x, int64_t n, float factor,
                      bool divide) {
  int64_t i = 0;
  const __m512 s = _mm512_set1_ps(factor);
  const __m512 max = _mm512_set1_ps(Format<f16>::finite_max);
  const __m512 min = _mm512_set1_ps(-Format<f16>::finite_max);
  const __m256i nan = _mm256_set1_epi16(static_cast<short>(Format<f16>::nan_code));
  for (; i + 16 <= n; i += 16) {
    __m512 v = _mm512_loadu_ps(x + i);
    v = divide ? _mm512_div_ps(v, s) : _mm512_mul_ps(v, s);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    v = _mm512_max_ps(_mm512_min_ps(v, max), min);
    const __m256i h = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm256_mask_blend_epi16(is_nan, h, nan));
  }
  for (; i < n; ++i) out[i] = encode_nearest<f16>(divide ? x[i] / factor : x[i] * factor);
}
#elif defined(__F16C__)
// The same bits as fp8.h's f16: saturate and make NaN canonical around the instruction, which does
// neither.
template <>
inline void load<f16>(float* __restrict out, const f16* __restrict x, int64_t n, float scale) {
  int64_t i = 0;
  const __m256 s = _mm256_set1_ps(scale);
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_cvtph_ps(h), s));
  }
  for (; i < n; ++i) out[i] = TensorCodec<f16>::decode(x[i], scale);
}

inline void store_f16(f16* __restrict out, const float* __restrict x, int64_t n, float factor,
                      bool divide) {
  int64_t i = 0;
  const __m256 s = _mm256_set1_ps(factor);
  const __m256 max = _mm256_set1_ps(Format<f16>::finite_max);
  const __m256 min = _mm256_set1_ps(-Format<f16>::finite_max);
  for (; i + 8 <= n; i += 8) {
    __m256 v = _mm256_loadu_ps(x + i);
    v = divide ? _mm256_div_ps(v, s) : _mm256_mul_ps(v, s);
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    v = _mm256_max_ps(_mm256_min_ps(v, max), min);
    __m128i h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    if (_mm256_movemask_ps(nan) != 0) {
      const __m256i wide = _mm256_castps_si256(nan);
      const __m128i mask =
          _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extractf128_si256(wide, 1));
      h = _mm_blendv_epi8(h, _mm_set1_epi16(0x7fff), mask);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), h);
  }
  for (; i < n; ++i) out[i] = encode_nearest<f16>(divide ? x[i] / factor : x[i] * factor);
}
#endif

#if defined(__AVX2__)
// Decodes whole registers, then the rest.
template <class T>
inline void load_fp8(float* __restrict out, const T* __restrict x, int64_t n, float scale) {
  int64_t i = 0;
  const bool exact = halves_are_exact(scale);
  for (; exact && i + kHalves <= n; i += kHalves) {
    Register v[2];
    halves_to_floats(v, halves_of(T{}, widen(x + i)), scale * kHalvesFactor<T>);
    QUAVER_PS(storeu)(out + i, v[0]);
    QUAVER_PS(storeu)(out + i + kRegister, v[1]);
  }
  for (; i < n; ++i) out[i] = TensorCodec<T>::decode(x[i], scale);
}

template <>
inline void load<e4m3>(float* __restrict out, const e4m3* __restrict x, int64_t n, float scale) {
  load_fp8(out, x, n, scale);
}

template <>
inline void load<e5m2>(float* __restrict out, const e5m2* __restrict x, int64_t n, float scale) {
  load_fp8(out, x, n, scale);
}

template <>
inline void store<f16>(f16* __restrict out, const float* __restrict x, int64_t n,
                       float inverse_scale) {
  store_f16(out, x, n, inverse_scale, false);
}

template <>
inline void store_divided<f16>(f16* __restrict out, const float* __restrict x, int64_t n,
                               float scale) {
  store_f16(out, x, n, scale, true);
}
#endif

#if defined(__AVX2__)
template <bool kDivide>
QUAVER_INLINE Values in_format(const Values& x, float factor) {
  return kDivide ? divided(x, factor) : scaled(x, factor);
}

template <class T, bool kDivide>
inline void store_fp8(T* __restrict out, const float* __restrict x, int64_t n, float factor) {
  int64_t i = 0;
  for (; i + kValues <= n; i += kValues)
    encode_values(out + i, in_format<kDivide>(load_values(x + i), factor));
  if (i == n) return;
  float rest[kValues] = {};
  memcpy(rest, x + i, static_cast<size_t>(n - i) * sizeof(float));
  T codes[kValues];
  encode_values(codes, in_format<kDivide>(load_values(rest), factor));
  memcpy(out + i, codes, static_cast<size_t>(n - i));
}

#define QUAVER_STORE_FP8(T)                                                                     \
  template <>                                                                                   \
  inline void store<T>(T* __restrict out, const float* __restrict x, int64_t n, float factor) { \
    store_fp8<T, false>(out, x, n, factor);                                                     \
  }                                                                                             \
  template <>                                                                                   \
  inline void store_divided<T>(T* __restrict out, const float* __restrict x, int64_t n,         \
                               float factor) {                                                  \
    store_fp8<T, true>(out, x, n, factor);                                                      \
  }
QUAVER_STORE_FP8(e4m3)
QUAVER_STORE_FP8(e5m2)
#undef QUAVER_STORE_FP8
#endif

// Calls body(T*) with the storage type of `type`.
template <class Pointer, class Body>
inline __attribute__((always_inline)) void with_type(DType type, Pointer* p, Body body) {
  switch (type) {
    case DType::f32: return body(static_cast<const float*>(p));
    case DType::f16: return body(static_cast<const f16*>(p));
    case DType::bf16: return body(static_cast<const bf16*>(p));
    case DType::e4m3: return body(static_cast<const e4m3*>(p));
    case DType::e5m2: return body(static_cast<const e5m2*>(p));
  }
}

inline const char* at(const void* p, DType type, int64_t i) {
  return static_cast<const char*>(p) + i * size_of(type);
}
inline char* at(void* p, DType type, int64_t i) {
  return static_cast<char*>(p) + i * size_of(type);
}

inline void load_any(float* out, const void* x, DType type, int64_t n, float scale) {
  with_type(type, x, [&](auto* p) { load(out, p, n, scale); });
}

template <class T>
inline T* mutable_pointer(const T* p) {
  return const_cast<T*>(p);
}

inline void store_any(void* out, DType type, const float* x, int64_t n, float inverse_scale) {
  with_type(type, out, [&](auto* p) { store(mutable_pointer(p), x, n, inverse_scale); });
}

inline void store_divided_any(void* out, DType type, const float* x, int64_t n, float scale) {
  with_type(type, out, [&](auto* p) { store_divided(mutable_pointer(p), x, n, scale); });
}

// The magnitude's bits order like the magnitudes, with every NaN above infinity.
template <class Bits, class T>
inline Bits amax_code(const T* x, int64_t n) {
  constexpr Bits mask = static_cast<Bits>(~Bits(0)) >> 1;
  Bits result = 0;
  _Pragma("omp simd reduction(max : result)") for (int64_t i = 0; i < n; ++i) {
    const Bits code = bit_cast<Bits>(x[i]) & mask;
    result = result < code ? code : result;
  }
  return result;
}

// Bits of the largest magnitude as a non-negative f32; any NaN gives a NaN.
inline uint32_t amax_any(const void* x, DType type, int64_t n) {
  uint32_t bits = 0;
  with_type(type, x, [&](auto* p) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(p)>>;
    if constexpr (std::is_same_v<T, float>)
      bits = amax_code<uint32_t>(p, n);
    else
      bits = bit_cast<uint32_t>(decode(T{amax_code<decltype(T::bits)>(p, n)}));
  });
  return bits;
}

}  // namespace
}  // namespace quaver::cpu::QUAVER_ISA
