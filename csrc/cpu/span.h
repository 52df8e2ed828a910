// Spans of values to f32 and back: the conversions that every vector loop begins and ends with.
// First in plain C++ for any type and machine, then by hand where an instruction set has something
// better for f16 and FP8. All give the bits of include/quaver/fp8.h.
//
// For simd*.cpp only, which are compiled once per instruction set.
#pragma once

#include "quaver/codec.h"

#if defined(__SSE2__)
// gcc 12 warns of the "undefined" operand inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

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

#if defined(__F16C__)
// FP8 widens to f16 by shifts, subnormals included: e5m2 is f16's upper byte, and e4m3 with its
// exponent in place is 2^-8 times its value. The instruction that widens f16 does the rest.
#if defined(__AVX512F__)
constexpr int64_t kWide = 32;
using Halves = __m512i;

inline Halves widen(const void* x) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(x)));
}
inline Halves e4m3_halves(Halves c) {
  const Halves magnitude = _mm512_and_si512(c, _mm512_set1_epi16(0x7f));
  const Halves sign = _mm512_and_si512(_mm512_slli_epi16(c, 8), _mm512_set1_epi16(-0x8000));
  const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
  const Halves half =
      _mm512_mask_blend_epi16(nan, _mm512_slli_epi16(magnitude, 7), _mm512_set1_epi16(0x7e00));
  return _mm512_or_si512(half, sign);
}
inline Halves e5m2_halves(Halves c) { return _mm512_slli_epi16(c, 8); }
inline void store_halves(float* out, Halves h, float scale) {
  const __m512 s = _mm512_set1_ps(scale);
  const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(h));
  const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1));
  _mm512_storeu_ps(out, _mm512_mul_ps(low, s));
  _mm512_storeu_ps(out + 16, _mm512_mul_ps(high, s));
}
#else
constexpr int64_t kWide = 16;
using Halves = __m256i;

inline Halves widen(const void* x) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(x)));
}
inline Halves e4m3_halves(Halves c) {
  const Halves magnitude = _mm256_and_si256(c, _mm256_set1_epi16(0x7f));
  const Halves sign = _mm256_and_si256(_mm256_slli_epi16(c, 8), _mm256_set1_epi16(-0x8000));
  const Halves nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
  const Halves half =
      _mm256_blendv_epi8(_mm256_slli_epi16(magnitude, 7), _mm256_set1_epi16(0x7e00), nan);
  return _mm256_or_si256(half, sign);
}
inline Halves e5m2_halves(Halves c) { return _mm256_slli_epi16(c, 8); }
inline void store_halves(float* out, Halves h, float scale) {
  const __m256 s = _mm256_set1_ps(scale);
  const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(h));
  const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1));
  _mm256_storeu_ps(out, _mm256_mul_ps(low, s));
  _mm256_storeu_ps(out + 8, _mm256_mul_ps(high, s));
}
#endif

template <>
inline void load<e4m3>(float* __restrict out, const e4m3* __restrict x, int64_t n, float scale) {
  int64_t i = 0;
  // Two exact steps, unless scale * 2^8 overflows where scale * value does not.
  const bool exact = scale < 1e30f && scale > -1e30f;
  for (; exact && i + kWide <= n; i += kWide)
    store_halves(out + i, e4m3_halves(widen(x + i)), scale * 256.0f);
  for (; i < n; ++i) out[i] = TensorCodec<e4m3>::decode(x[i], scale);
}

template <>
inline void load<e5m2>(float* __restrict out, const e5m2* __restrict x, int64_t n, float scale) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) store_halves(out + i, e5m2_halves(widen(x + i)), scale);
  for (; i < n; ++i) out[i] = TensorCodec<e5m2>::decode(x[i], scale);
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

#if defined(__AVX512F__)
// fp8.h's nearest-even encoding of 16 values, in half of the instructions that the compiler needs.
// Adding a power of two whose ulp is the code's rounds; the sum's low bits are then the mantissa,
// with the implicit one for normal values, and the exponent goes on top.
template <class T>
inline __m128i encode16(__m512 v) {
  using F = Format<T>;
  constexpr int drop = 23 - F::mantissa;
  constexpr int exponent = 127 + 1 - F::bias;  // of the smallest normal value
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i positive = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __m512 a = _mm512_min_ps(_mm512_castsi512_ps(positive), _mm512_set1_ps(F::finite_max));
  const __m512i e =
      _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7f800000)),
                       _mm512_set1_epi32(exponent << 23));
  const __m512i magic = _mm512_add_epi32(e, _mm512_set1_epi32(drop << 23));
  const __m512 sum = _mm512_add_ps(a, _mm512_castsi512_ps(magic));
  const __m512i mantissa = _mm512_sub_epi32(_mm512_castps_si512(sum), magic);
  __m512i code = _mm512_add_epi32(mantissa, _mm512_srli_epi32(e, drop));
  code = _mm512_sub_epi32(code, _mm512_set1_epi32(exponent << F::mantissa));
  // code | (bits >> 24 & 0x80)
  code =
      _mm512_ternarylogic_epi32(code, _mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80), 0xf8);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  code = _mm512_mask_mov_epi32(code, nan, _mm512_set1_epi32(F::nan_code));
  return _mm512_cvtepi32_epi8(code);
}

template <class T, bool kDivide>
inline void store_fp8(T* __restrict out, const float* __restrict x, int64_t n, float factor) {
  const __m512 f = _mm512_set1_ps(factor);
  auto scaled = [f](__m512 v) { return kDivide ? _mm512_div_ps(v, f) : _mm512_mul_ps(v, f); };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    prefetch(x + i);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     encode16<T>(scaled(_mm512_loadu_ps(x + i))));
  }
  if (i == n) return;
  const __mmask16 rest = static_cast<__mmask16>((1u << (n - i)) - 1u);
  _mm_mask_storeu_epi8(out + i, rest, encode16<T>(scaled(_mm512_maskz_loadu_ps(rest, x + i))));
}

#elif defined(__AVX2__)
// The same for 8 values, as 32-bit codes.
template <class T>
inline __m256i encode8(__m256 v) {
  using F = Format<T>;
  constexpr int drop = 23 - F::mantissa;
  constexpr int exponent = 127 + 1 - F::bias;
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i positive = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  const __m256 a = _mm256_min_ps(_mm256_castsi256_ps(positive), _mm256_set1_ps(F::finite_max));
  const __m256i e =
      _mm256_max_epi32(_mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7f800000)),
                       _mm256_set1_epi32(exponent << 23));
  const __m256i magic = _mm256_add_epi32(e, _mm256_set1_epi32(drop << 23));
  const __m256 sum = _mm256_add_ps(a, _mm256_castsi256_ps(magic));
  const __m256i mantissa = _mm256_sub_epi32(_mm256_castps_si256(sum), magic);
  __m256i code = _mm256_add_epi32(mantissa, _mm256_srli_epi32(e, drop));
  code = _mm256_sub_epi32(code, _mm256_set1_epi32(exponent << F::mantissa));
  code =
      _mm256_or_si256(code, _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80)));
  const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(code, _mm256_set1_epi32(F::nan_code), _mm256_castps_si256(nan));
}

template <class T>
inline __m128i encode16(__m256 low, __m256 high) {
  const __m256i words =
      _mm256_permute4x64_epi64(_mm256_packus_epi32(encode8<T>(low), encode8<T>(high)), 0xd8);
  return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

template <class T, bool kDivide>
inline void store_fp8(T* __restrict out, const float* __restrict x, int64_t n, float factor) {
  const __m256 f = _mm256_set1_ps(factor);
  auto scaled = [f](const float* p) {
    const __m256 v = _mm256_loadu_ps(p);
    return kDivide ? _mm256_div_ps(v, f) : _mm256_mul_ps(v, f);
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    prefetch(x + i);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     encode16<T>(scaled(x + i), scaled(x + i + 8)));
  }
  if (i == n) return;
  float rest[16] = {};
  memcpy(rest, x + i, static_cast<size_t>(n - i) * sizeof(float));
  T codes[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), encode16<T>(scaled(rest), scaled(rest + 8)));
  memcpy(out + i, codes, static_cast<size_t>(n - i));
}
#endif

#if defined(__AVX2__)
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

}  // namespace
}  // namespace quaver::cpu::QUAVER_ISA
