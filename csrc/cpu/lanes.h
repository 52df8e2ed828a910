// Four AVX2 vectors that each operation processes together: 32 floats or 32 integers of 32 bits. A
// long chain of dependent operations on one vector leaves most of the processor idle, and its
// window is too small to overlap the chains of successive vectors.
//
// For simd*.cpp only, which are compiled once per instruction set.
#pragma once

#include "registers.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

constexpr int64_t kVector = 8, kLanes = 4 * kVector;

struct Floats {
  __m256 of[4];
};
struct Ints {
  __m256i of[4];
};

// body(k) of each vector.
template <class Lanes, class Body>
QUAVER_INLINE Lanes each(Body body) {
  return {{body(0), body(1), body(2), body(3)}};
}

QUAVER_INLINE Floats lanes(float x) {
  return each<Floats>([&](int) { return _mm256_set1_ps(x); });
}
QUAVER_INLINE Ints lanes(int32_t x) {
  return each<Ints>([&](int) { return _mm256_set1_epi32(x); });
}
QUAVER_INLINE Floats load_lanes(const float* p) {
  return each<Floats>([&](int k) { return _mm256_loadu_ps(p + k * kVector); });
}
QUAVER_INLINE void store_lanes(float* p, const Floats& x) {
  for (int k = 0; k < 4; ++k) _mm256_storeu_ps(p + k * kVector, x.of[k]);
}
QUAVER_INLINE Ints bits_of(const Floats& x) {
  return each<Ints>([&](int k) { return _mm256_castps_si256(x.of[k]); });
}
QUAVER_INLINE Floats floats_of(const Ints& x) {
  return each<Floats>([&](int k) { return _mm256_castsi256_ps(x.of[k]); });
}

#define QUAVER_LANES(name, Result, A, B, intrinsic)                          \
  QUAVER_INLINE Result name(const A& a, const B& b) {                        \
    return each<Result>([&](int k) { return intrinsic(a.of[k], b.of[k]); }); \
  }
QUAVER_LANES(operator+, Floats, Floats, Floats, _mm256_add_ps)
QUAVER_LANES(operator-, Floats, Floats, Floats, _mm256_sub_ps)
QUAVER_LANES(operator*, Floats, Floats, Floats, _mm256_mul_ps)
QUAVER_LANES(operator/, Floats, Floats, Floats, _mm256_div_ps)
QUAVER_LANES(operator&, Floats, Floats, Floats, _mm256_and_ps)
QUAVER_LANES(larger, Floats, Floats, Floats, _mm256_max_ps)
QUAVER_LANES(and_not, Floats, Floats, Floats, _mm256_andnot_ps)  // ~a & b
QUAVER_LANES(operator+, Ints, Ints, Ints, _mm256_add_epi32)
QUAVER_LANES(operator-, Ints, Ints, Ints, _mm256_sub_epi32)
QUAVER_LANES(operator&, Ints, Ints, Ints, _mm256_and_si256)
QUAVER_LANES(and_not, Ints, Ints, Ints, _mm256_andnot_si256)
QUAVER_LANES(larger, Ints, Ints, Ints, _mm256_max_epi32)
#undef QUAVER_LANES

// All ones where it holds.
QUAVER_INLINE Floats operator<(const Floats& a, const Floats& b) {
  return each<Floats>([&](int k) { return _mm256_cmp_ps(a.of[k], b.of[k], _CMP_LT_OQ); });
}
QUAVER_INLINE Floats operator==(const Floats& a, const Floats& b) {
  return each<Floats>([&](int k) { return _mm256_cmp_ps(a.of[k], b.of[k], _CMP_EQ_OQ); });
}
QUAVER_INLINE Floats fma(const Floats& a, const Floats& b, const Floats& c) {
  return each<Floats>([&](int k) { return _mm256_fmadd_ps(a.of[k], b.of[k], c.of[k]); });
}
QUAVER_INLINE Floats root(const Floats& x) {
  return each<Floats>([&](int k) { return _mm256_sqrt_ps(x.of[k]); });
}
QUAVER_INLINE Floats magnitude(const Floats& x) { return x & floats_of(lanes(0x7fffffff)); }
QUAVER_INLINE Floats to_floats(const Ints& x) {
  return each<Floats>([&](int k) { return _mm256_cvtepi32_ps(x.of[k]); });
}
QUAVER_INLINE Ints truncated(const Floats& x) {
  return each<Ints>([&](int k) { return _mm256_cvttps_epi32(x.of[k]); });
}
// b where `mask` is all ones, a where it is zero.
QUAVER_INLINE Ints blended(const Ints& a, const Ints& b, const Floats& mask) {
  return each<Ints>(
      [&](int k) { return _mm256_blendv_epi8(a.of[k], b.of[k], _mm256_castps_si256(mask.of[k])); });
}
template <int n>
QUAVER_INLINE Ints shifted_left(const Ints& x) {
  return each<Ints>([&](int k) { return _mm256_slli_epi32(x.of[k], n); });
}
template <int n>
QUAVER_INLINE Ints shifted_right(const Ints& x) {  // keeps the sign
  return each<Ints>([&](int k) { return _mm256_srai_epi32(x.of[k], n); });
}

// The 32 values, each less `base` and then from 0 to 255, as bytes in the order that in_order()
// puts right.
QUAVER_INLINE __m256i bytes(const Ints& x, int base) {
  const __m256i b = _mm256_set1_epi16(static_cast<short>(base));
  const __m256i low = _mm256_packus_epi32(x.of[0], x.of[1]);
  const __m256i high = _mm256_packus_epi32(x.of[2], x.of[3]);
  return _mm256_packus_epi16(_mm256_sub_epi16(low, b), _mm256_sub_epi16(high, b));
}

// 0x80 where x is negative, in that order too: saturation keeps signs.
QUAVER_INLINE __m256i sign_bytes(const Floats& x) {
  const Ints i = bits_of(x);
  const __m256i low = _mm256_packs_epi32(i.of[0], i.of[1]);
  const __m256i high = _mm256_packs_epi32(i.of[2], i.of[3]);
  return _mm256_and_si256(_mm256_packs_epi16(low, high), _mm256_set1_epi8(-0x80));
}

}  // namespace
}  // namespace quaver::cpu::QUAVER_ISA
