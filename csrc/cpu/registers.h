// Values in the registers of an instruction set: f32 from every storage type, and FP8 from f32,
// with the bits of include/quaver/fp8.h. Loops over them keep what they compute out of the memory;
// a loop over span.h's buffers is simpler and works with any type and machine.
//
// For simd*.cpp only, which are compiled once per instruction set; empty without AVX2.
#pragma once

#include "quaver/codec.h"

#if defined(__SSE2__)
// gcc 12 warns of the "undefined" operand inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

#define QUAVER_INLINE inline __attribute__((always_inline))

#if defined(__AVX2__)
namespace quaver::cpu::QUAVER_ISA {
namespace {

#if defined(__AVX512F__)
using Register = __m512;
using Integers = __m512i;
#define QUAVER_PS(name) _mm512_##name##_ps
#define QUAVER_PD(name) _mm512_##name##_pd
#define QUAVER_INT(name) _mm512_##name
#define QUAVER_BITS(name) _mm512_##name##_si512
#else
using Register = __m256;
using Integers = __m256i;
#define QUAVER_PS(name) _mm256_##name##_ps
#define QUAVER_PD(name) _mm256_##name##_pd
#define QUAVER_INT(name) _mm256_##name
#define QUAVER_BITS(name) _mm256_##name##_si256
#endif

constexpr int64_t kRegister = sizeof(Register) / sizeof(float);
constexpr int kRegisters = 4;  // that are processed together
constexpr int64_t kValues = kRegisters * kRegister;

struct Values {
  Register of[kRegisters];
};

QUAVER_INLINE Register all(float x) { return QUAVER_PS(set1)(x); }
QUAVER_INLINE Integers all(int32_t x) { return QUAVER_INT(set1_epi32)(x); }
QUAVER_INLINE Integers bits_of(Register x) {
#if defined(__AVX512F__)
  return _mm512_castps_si512(x);
#else
  return _mm256_castps_si256(x);
#endif
}
QUAVER_INLINE Register floats_of(Integers x) {
#if defined(__AVX512F__)
  return _mm512_castsi512_ps(x);
#else
  return _mm256_castsi256_ps(x);
#endif
}
QUAVER_INLINE Integers both(Integers a, Integers b) { return QUAVER_BITS (and)(a, b); }

QUAVER_INLINE Integers inverted(Integers x) { return QUAVER_BITS(xor)(x, all(-1)); }

// The magnitude's bits order like the magnitudes, with every NaN above infinity.
QUAVER_INLINE Integers magnitude_bits(Register x) { return both(bits_of(x), all(0x7fffffff)); }
QUAVER_INLINE Integers larger_bits(Integers a, Integers b) { return QUAVER_INT(max_epu32)(a, b); }

QUAVER_INLINE uint32_t largest_bits(Integers x) {
#if defined(__AVX512F__)
  const __m256i half = _mm256_max_epu32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
#else
  const __m256i half = x;
#endif
  __m128i y = _mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  y = _mm_max_epu32(y, _mm_shuffle_epi32(y, 0x4e));
  y = _mm_max_epu32(y, _mm_shuffle_epi32(y, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(y));
}

QUAVER_INLINE bool any_nan(const Values& x) {
#if defined(__AVX512F__)
  return (_mm512_cmp_ps_mask(x.of[0], x.of[1], _CMP_UNORD_Q) |
          _mm512_cmp_ps_mask(x.of[2], x.of[3], _CMP_UNORD_Q)) != 0;
#else
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.of[0], x.of[1], _CMP_UNORD_Q),
                                         _mm256_cmp_ps(x.of[2], x.of[3], _CMP_UNORD_Q))) != 0;
#endif
}

// kValues values from memory.
QUAVER_INLINE Values load_values(const float* x) {
  Values v;
  for (int k = 0; k < kRegisters; ++k) v.of[k] = QUAVER_PS(loadu)(x + k * kRegister);
  return v;
}

QUAVER_INLINE Values load_values(const bf16* x) {
  Values v;
  for (int k = 0; k < kRegisters; ++k) {
#if defined(__AVX512F__)
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + k * kRegister));
#else
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + k * kRegister));
#endif
    v.of[k] = floats_of(QUAVER_INT(slli_epi32)(QUAVER_INT(cvtepu16_epi32)(codes), 16));
  }
  return v;
}

QUAVER_INLINE Values scaled(const Values& x, float factor) {
  Values v;
  for (int k = 0; k < kRegisters; ++k) v.of[k] = QUAVER_PS(mul)(x.of[k], all(factor));
  return v;
}
QUAVER_INLINE Values divided(const Values& x, float divisor) {
  Values v;
  for (int k = 0; k < kRegisters; ++k) v.of[k] = QUAVER_PS(div)(x.of[k], all(divisor));
  return v;
}

// FP8 widens to f16 by shifts, subnormals included: e5m2 is f16's upper byte, and e4m3 with its
// exponent in place is 2^-8 times its value. The instruction that widens f16 does the rest.
constexpr int64_t kHalves = 2 * kRegister;  // values that widen at once

// Copies of the sign fill the upper byte.
QUAVER_INLINE Integers widen(const void* x) {
#if defined(__AVX512F__)
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(x)));
#else
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(x)));
#endif
}

// The halves times this are the values.
template <class T>
constexpr float kHalvesFactor = 15 - Format<T>::bias == 8 ? 256.0f : 1.0f;

QUAVER_INLINE Integers halves_of(e4m3, Integers c) {
  // Two copies of the sign are left above the magnitude, of which the lower one must go.
  const Integers half = both(QUAVER_INT(slli_epi16)(c, 7), QUAVER_INT(set1_epi16)(-0x4001));
  const Integers nan_code = QUAVER_INT(set1_epi16)(0x7f), magnitude = both(c, nan_code);
  const Integers to_nan = QUAVER_INT(set1_epi16)(0x7e00 - (0x7f << 7));
#if defined(__AVX512F__)
  return _mm512_mask_add_epi16(half, _mm512_cmpeq_epi16_mask(magnitude, nan_code), half, to_nan);
#else
  return _mm256_add_epi16(half, both(_mm256_cmpeq_epi16(magnitude, nan_code), to_nan));
#endif
}
QUAVER_INLINE Integers halves_of(e5m2, Integers c) { return QUAVER_INT(slli_epi16)(c, 8); }

QUAVER_INLINE void halves_to_floats(Register out[2], Integers h, float factor) {
#if defined(__AVX512F__)
  out[0] = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(h)), all(factor));
  out[1] = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1)), all(factor));
#else
  out[0] = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(h)), all(factor));
  out[1] = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(h, 1)), all(factor));
#endif
}

// A decoding is two exact steps, unless scale * 2^8 overflows where scale * value does not.
QUAVER_INLINE bool halves_are_exact(float scale) { return scale < 1e30f && scale > -1e30f; }

template <class T>
QUAVER_INLINE Values load_values(const T* x, float scale) {
  Values v;
  for (int k = 0; k < kRegisters; k += 2)
    halves_to_floats(v.of + k, halves_of(T{}, widen(x + k * kRegister)), scale * kHalvesFactor<T>);
  return v;
}
QUAVER_INLINE Values load_values(const e4m3* x) { return load_values(x, 1.0f); }
QUAVER_INLINE Values load_values(const e5m2* x) { return load_values(x, 1.0f); }

QUAVER_INLINE Values load_values(const f16* x) {
  Values v;
  for (int k = 0; k < kRegisters; ++k) {
#if defined(__AVX512F__)
    const auto* codes = reinterpret_cast<const __m256i*>(x + k * kRegister);
    v.of[k] = _mm512_cvtph_ps(_mm256_loadu_si256(codes));
#else
    const auto* codes = reinterpret_cast<const __m128i*>(x + k * kRegister);
    v.of[k] = _mm256_cvtph_ps(_mm_loadu_si128(codes));
#endif
  }
  return v;
}

// A register's values in f64.
struct Doubles {
#if defined(__AVX512F__)
  __m512d low, high;
#else
  __m256d low, high;
#endif
};

QUAVER_INLINE Doubles doubles_of(Register x) {
#if defined(__AVX512F__)
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)),
          _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
#else
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
#endif
}

// FP8 from f32, to nearest even. Adding a power of two whose ulp is the code's rounds; the sum's
// low bits are then the mantissa, with the implicit one for normal values, and the exponent goes on
// top.

// Codes that are kCodeBase<T> too high, of magnitudes that are no NaN.
template <class T>
constexpr int kCodeBase = (127 + 1 - Format<T>::bias) << Format<T>::mantissa;

template <class T>
QUAVER_INLINE Integers encoded_magnitude(Register v) {
  using F = Format<T>;
  constexpr int drop = 23 - F::mantissa;
  const Integers smallest_normal = all(kCodeBase<T> << drop);
  const Register a = QUAVER_PS(min)(floats_of(magnitude_bits(v)), all(F::finite_max));
  const Integers e = larger_bits(both(bits_of(a), all(0x7f800000)), smallest_normal);
  const Integers magic = QUAVER_INT(add_epi32)(e, all(drop << 23));
  const Register sum = QUAVER_PS(add)(a, floats_of(magic));
  return QUAVER_INT(add_epi32)(QUAVER_INT(sub_epi32)(bits_of(sum), magic),
                               QUAVER_INT(srli_epi32)(e, drop));
}

// One register's codes, as integers of 32 bits; NaN gives the canonical code.
template <class T>
QUAVER_INLINE Integers encoded(Register v) {
  using F = Format<T>;
  Integers code = QUAVER_INT(sub_epi32)(encoded_magnitude<T>(v), all(kCodeBase<T>));
  const Integers sign = QUAVER_INT(srli_epi32)(bits_of(v), 24);
#if defined(__AVX512F__)
  code = _mm512_ternarylogic_epi32(code, sign, all(0x80), 0xf8);  // code | (sign & 0x80)
  return _mm512_mask_mov_epi32(code, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                               all(static_cast<int32_t>(F::nan_code)));
#else
  code = _mm256_or_si256(code, both(sign, all(0x80)));
  return _mm256_blendv_epi8(code, all(static_cast<int32_t>(F::nan_code)),
                            bits_of(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
#endif
}

// Integers of 16 bits from 32, of 8 from 16; both saturate. Each works in lanes of 128 bits.
QUAVER_INLINE Integers words(Integers a, Integers b) { return QUAVER_INT(packus_epi32)(a, b); }
QUAVER_INLINE Integers bytes(Integers a, Integers b) { return QUAVER_INT(packus_epi16)(a, b); }

// Puts four registers' bytes in order, of which `bytes` of `words` left a quarter in each lane.
QUAVER_INLINE Integers in_order(Integers x) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
#else
  return _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
#endif
}

// The largest number of each of 16 registers, in order, where larger(a, b) compares numbers of 16
// or 32 bits; of 16, the larger of the two that are left in 32 bits remains to be found. A round
// compares the halves of two registers and puts both results into one.
template <class Larger>
QUAVER_INLINE void largest_of_16(Integers* out, Integers* x, Larger larger) {
  int n = 16;
  auto fold = [&](auto low, auto high) {
    n /= 2;
    for (int i = 0; i < n; ++i)
      x[i] = larger(low(x[2 * i], x[2 * i + 1]), high(x[2 * i], x[2 * i + 1]));
  };
#define QUAVER_FOLD(name, low, high)                           \
  fold([](Integers a, Integers b) { return name(a, b, low); }, \
       [](Integers a, Integers b) { return name(a, b, high); })
#define QUAVER_SHUFFLED(a, b, lanes) bits_of(QUAVER_PS(shuffle)(floats_of(a), floats_of(b), lanes))
#if defined(__AVX512F__)
  QUAVER_FOLD(_mm512_shuffle_i64x2, 0x44, 0xee);
  QUAVER_FOLD(_mm512_shuffle_i64x2, 0x88, 0xdd);
#else
  QUAVER_FOLD(_mm256_permute2x128_si256, 0x20, 0x31);
#endif
  QUAVER_FOLD(QUAVER_SHUFFLED, 0x44, 0xee);
  QUAVER_FOLD(QUAVER_SHUFFLED, 0x88, 0xdd);
#undef QUAVER_SHUFFLED
#undef QUAVER_FOLD
  for (int i = 0; i < n; ++i) out[i] = in_order(x[i]);
}

// kValues codes, a byte each.
template <class T>
QUAVER_INLINE Integers encoded_values(const Values& x) {
  if (__builtin_expect(any_nan(x), 0))
    return in_order(bytes(words(encoded<T>(x.of[0]), encoded<T>(x.of[1])),
                          words(encoded<T>(x.of[2]), encoded<T>(x.of[3]))));
  // Signs apart, which saturation keeps, and the base of all codes at once.
  const Integers base = QUAVER_INT(set1_epi16)(static_cast<short>(kCodeBase<T>));
  auto pair = [&](int k) {
    return QUAVER_INT(sub_epi16)(
        words(encoded_magnitude<T>(x.of[k]), encoded_magnitude<T>(x.of[k + 1])), base);
  };
  auto signs = [&](int k) {
    return QUAVER_INT(packs_epi32)(bits_of(x.of[k]), bits_of(x.of[k + 1]));
  };
  const Integers sign =
      both(QUAVER_INT(packs_epi16)(signs(0), signs(2)), QUAVER_INT(set1_epi8)(-0x80));
  return in_order(QUAVER_BITS(or)(bytes(pair(0), pair(2)), sign));
}

template <class T>
QUAVER_INLINE void store_codes(T* out, Integers codes) {
  QUAVER_BITS(storeu)(reinterpret_cast<Integers*>(out), codes);
}

template <class T>
QUAVER_INLINE void encode_values(T* out, const Values& x) {
  store_codes(out, encoded_values<T>(x));
}

}  // namespace
}  // namespace quaver::cpu::QUAVER_ISA
#endif  // __AVX2__
