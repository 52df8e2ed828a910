// Arithmetic on four registers at a time: a long chain of dependent operations on one vector leaves
// most of the processor idle, and its window is too small to overlap the chains of successive
// vectors.
//
// For simd*.cpp only, which are compiled once per instruction set.
#pragma once

#include "registers.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

using Floats = Values;
struct Ints {
  Integers of[kRegisters];
};

// Which values something holds of.
#if defined(__AVX512F__)
using Mask = __mmask16;
#else
using Mask = Register;  // all ones where it does
#endif
struct Masks {
  Mask of[kRegisters];
};

// body(k) of each register.
template <class Lanes, class Body>
QUAVER_INLINE Lanes each(Body body) {
  return {{body(0), body(1), body(2), body(3)}};
}

QUAVER_INLINE Floats lanes(float x) {
  return each<Floats>([&](int) { return all(x); });
}
QUAVER_INLINE Ints lanes(int32_t x) {
  return each<Ints>([&](int) { return all(x); });
}
QUAVER_INLINE void store_lanes(float* p, const Floats& x) {
  for (int k = 0; k < kRegisters; ++k) QUAVER_PS(storeu)(p + k * kRegister, x.of[k]);
}
QUAVER_INLINE Ints bits_of(const Floats& x) {
  return each<Ints>([&](int k) { return bits_of(x.of[k]); });
}
QUAVER_INLINE Floats floats_of(const Ints& x) {
  return each<Floats>([&](int k) { return floats_of(x.of[k]); });
}

#define QUAVER_LANES(name, Result, A, B, operation)                          \
  QUAVER_INLINE Result name(const A& a, const B& b) {                        \
    return each<Result>([&](int k) { return operation(a.of[k], b.of[k]); }); \
  }
QUAVER_LANES(operator+, Floats, Floats, Floats, QUAVER_PS(add))
QUAVER_LANES(operator-, Floats, Floats, Floats, QUAVER_PS(sub))
QUAVER_LANES(operator*, Floats, Floats, Floats, QUAVER_PS(mul))
QUAVER_LANES(operator/, Floats, Floats, Floats, QUAVER_PS(div))
QUAVER_LANES(larger, Floats, Floats, Floats, QUAVER_PS(max))
QUAVER_LANES(operator+, Ints, Ints, Ints, QUAVER_INT(add_epi32))
QUAVER_LANES(operator-, Ints, Ints, Ints, QUAVER_INT(sub_epi32))
QUAVER_LANES(operator&, Ints, Ints, Ints, both)
QUAVER_LANES(larger, Ints, Ints, Ints, QUAVER_INT(max_epi32))
#undef QUAVER_LANES

#if defined(__AVX512F__)
#define QUAVER_COMPARED(a, b, kind) _mm512_cmp_ps_mask(a, b, kind)
#else
#define QUAVER_COMPARED(a, b, kind) _mm256_cmp_ps(a, b, kind)
#endif
QUAVER_INLINE Masks operator<(const Floats& a, const Floats& b) {
  return each<Masks>([&](int k) { return QUAVER_COMPARED(a.of[k], b.of[k], _CMP_LT_OQ); });
}
QUAVER_INLINE Masks operator==(const Floats& a, const Floats& b) {
  return each<Masks>([&](int k) { return QUAVER_COMPARED(a.of[k], b.of[k], _CMP_EQ_OQ); });
}
#undef QUAVER_COMPARED

// x where the mask does not hold, else zero.
QUAVER_INLINE Ints unless(const Masks& mask, const Ints& x) {
  return each<Ints>([&](int k) {
#if defined(__AVX512F__)
    return _mm512_maskz_mov_epi32(static_cast<Mask>(~mask.of[k]), x.of[k]);
#else
    return _mm256_andnot_si256(bits_of(mask.of[k]), x.of[k]);
#endif
  });
}

// b where the mask holds, else a.
QUAVER_INLINE Ints blended(const Ints& a, const Ints& b, const Masks& mask) {
  return each<Ints>([&](int k) {
#if defined(__AVX512F__)
    return _mm512_mask_mov_epi32(a.of[k], mask.of[k], b.of[k]);
#else
    return _mm256_blendv_epi8(a.of[k], b.of[k], bits_of(mask.of[k]));
#endif
  });
}

QUAVER_INLINE Floats fma(const Floats& a, const Floats& b, const Floats& c) {
  return each<Floats>([&](int k) { return QUAVER_PS(fmadd)(a.of[k], b.of[k], c.of[k]); });
}
QUAVER_INLINE Floats root(const Floats& x) {
  return each<Floats>([&](int k) { return QUAVER_PS(sqrt)(x.of[k]); });
}
QUAVER_INLINE Floats magnitude(const Floats& x) {
  return floats_of(bits_of(x) & lanes(0x7fffffff));
}
QUAVER_INLINE Floats to_floats(const Ints& x) {
  return each<Floats>([&](int k) { return QUAVER_INT(cvtepi32_ps)(x.of[k]); });
}
QUAVER_INLINE Ints truncated(const Floats& x) {
  return each<Ints>([&](int k) { return QUAVER_INT(cvttps_epi32)(x.of[k]); });
}
template <int n>
QUAVER_INLINE Ints shifted_left(const Ints& x) {
  return each<Ints>([&](int k) { return QUAVER_INT(slli_epi32)(x.of[k], n); });
}
template <int n>
QUAVER_INLINE Ints shifted_right(const Ints& x) {  // keeps the sign
  return each<Ints>([&](int k) { return QUAVER_INT(srai_epi32)(x.of[k], n); });
}

// Each value less `base`, and then from 0 to 255, as bytes in order.
QUAVER_INLINE Integers bytes(const Ints& x, int base) {
  const Integers b = QUAVER_INT(set1_epi16)(static_cast<short>(base));
  return in_order(bytes(QUAVER_INT(sub_epi16)(words(x.of[0], x.of[1]), b),
                        QUAVER_INT(sub_epi16)(words(x.of[2], x.of[3]), b)));
}

// 0x80 where x is negative, as bytes in order: saturation keeps signs.
QUAVER_INLINE Integers sign_bytes(const Floats& x) {
  const Ints i = bits_of(x);
  const Integers low = QUAVER_INT(packs_epi32)(i.of[0], i.of[1]);
  const Integers high = QUAVER_INT(packs_epi32)(i.of[2], i.of[3]);
  return in_order(both(QUAVER_INT(packs_epi16)(low, high), QUAVER_INT(set1_epi8)(-0x80)));
}

}  // namespace
}  // namespace quaver::cpu::QUAVER_ISA
