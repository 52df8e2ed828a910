// State codecs: how one element of a weight or a moment is stored. Adam of each backend is written
// over them. A state is scaled as a whole, by groups of 128 flat elements, or by such groups after
// dynamic range expansion (COAT, arXiv 2410.19313, section 4).
#pragma once

#include "quaver/fp8.h"
#include "quaver/math.h"
#include "quaver/scale.h"

namespace quaver {

enum class Scaling : int8_t { tensor, group, expand };

constexpr int64_t kGroup = 128;  // flat elements that share a scale

constexpr int64_t group_count(int64_t numel) { return (numel + kGroup - 1) / kGroup; }

// One storage format with one scale for the whole tensor, a power of two, so that multiplying by
// its reciprocal is exact. f32 and bf16 have scale 1.
template <class T>
struct TensorCodec {
  QUAVER_HD float decode(T code, float scale) { return quaver::decode(code) * scale; }
  QUAVER_HD T encode(float x, float inverse_scale) { return encode_nearest<T>(x * inverse_scale); }
};

// The range of a group, from which its scale is chosen: `most` has the bits of the largest
// magnitude, `least` those of the smallest, minus 1, so that a zero wraps to the maximum and is
// never the least. An infinity counts as the largest float. NaN is ignored.
struct GroupRange {
  uint32_t most = 0, least = 0xffffffffu;
};

QUAVER_HD uint32_t range_bits(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x) & 0x7fffffffu;
  const uint32_t finite = bits < 0x7f7fffffu ? bits : 0x7f7fffffu;
  return select(bits > 0x7f800000u, 0u, finite);
}

// Dynamic range expansion stores |x|^k, with k such that the group's ratio of largest to smallest
// fills the format:
//
//     code = round(max * (|x| / scale)^k)        x = scale * (code / max)^(1 / k)
//
// `max` is the format's finite maximum and `scale` the group's largest magnitude. This is the
// paper's mid and s in one number: ((|x| / mid)^k / s with s = (largest / mid)^k / max is the same.
// k is in sixteenths, one byte, and sits in the low byte of the scale's own bits: the scale is the
// smallest f32 with that low byte that the largest magnitude does not exceed, at most 2^-15 above.
//
// With k < 1 every element would be coarser than without expansion, to keep the smallest. A
// constant group would need k = infinity; a byte holds less than 16.
constexpr uint32_t kPowerOne = 16, kPowerMost = 255, kPowerMask = 0xff;

// The ratio of largest to smallest element after expansion is max^2 / 2, as in the paper's code,
// which puts the smallest element at 2.3 times the format's smallest subnormal.
template <class T> struct Expansion;
template <> struct Expansion<e4m3> {
  static constexpr float log2_max = 8.80735492f, log2_ratio = 2.0f * log2_max - 1.0f;
};
template <> struct Expansion<e5m2> {
  static constexpr float log2_max = 15.8073549f, log2_ratio = 2.0f * log2_max - 1.0f;
};

// log2 of a normal x > 0 and 2^x for |x| <= 120, to within 2^-18 absolute and relative: precise
// enough for codes of two or three mantissa bits, at a third of math.h's cost. They are exact at
// powers of two and at integers, and evaluate minimax polynomials of log2(1 + u) / u and
// (2^f - 1) / f.
QUAVER_HD float log2_coarse(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x) - 0x3f3504f3u;  // x = m * 2^e, m from sqrt(1/2)
  const float e = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float u = bit_cast<float>((bits & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
  float p = -0.206591845f;
  p = fma(p, u, 0.32215485f);
  p = fma(p, u, -0.367489964f);
  p = fma(p, u, 0.479348004f);
  p = fma(p, u, -0.721131861f);
  p = fma(p, u, 1.4427135f);
  return fma(p, u, e);
}

QUAVER_HD float exp2_coarse(float x) {
  constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const float shifted = x + to_integer;
  const float f = x - (shifted - to_integer);
  float p = 9.58285294e-3f;
  p = fma(p, f, 5.59064262e-2f);
  p = fma(p, f, 2.40240991e-1f);
  p = fma(p, f, 6.93124175e-1f);
  p = fma(p, f, 1.0f);
  return bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(shifted) << 23));
}

// The factor that makes the magnitudes of a small group normal numbers: 2^64 for groups below
// 2^-64.
QUAVER_HD float group_lift(float scale) {
  return bit_cast<float>(select(scale < 5.421010862e-20f, 0x5f800000u, 0x3f800000u));  // 2^-64
}

QUAVER_HD uint32_t at_least_one(uint32_t power) { return power > kPowerOne ? power : kPowerOne; }

// k of a group, in sixteenths. It has no branches, so that loops over groups vectorise.
template <class T>
QUAVER_HD uint32_t group_power(GroupRange r) {
  const float most = bit_cast<float>(r.most), lift = group_lift(most);
  const float ratio = log2_coarse(most * lift) - log2_coarse(bit_cast<float>(r.least + 1u) * lift);
  const float wanted = Expansion<T>::log2_ratio * kPowerOne / ratio;
  // The ratio of a constant group is not above 0.
  const bool fits = (ratio > 0.0f) & (wanted < float(kPowerMost));
  const float power = bit_cast<float>(
      select(fits, bit_cast<uint32_t>(wanted), bit_cast<uint32_t>(float(kPowerMost))));
  // A subnormal scale has too few bits to hold k in its low byte.
  return select(r.most < 0x800000u, kPowerOne,
                at_least_one(static_cast<uint32_t>(static_cast<int32_t>(power))));
}

// The scale of a group whose codes are of type T.
template <class T>
QUAVER_HD float expanded_scale(GroupRange r) {
  uint32_t bits = (r.most & ~kPowerMask) | group_power<T>(r);
  bits += select(bits < r.most, kPowerMask + 1, 0u);
  return bit_cast<float>(bits - select(bits < 0x7f800000u, 0u, kPowerMask + 1));
}

template <class T>
QUAVER_HD float group_scale(bool expand, GroupRange r) {
  return expand ? expanded_scale<T>(r)
                : scale_from_amax(bit_cast<float>(r.most), Format<T>::finite_max, false);
}

QUAVER_HD float power_of(float scale) {
  const uint32_t power = at_least_one(bit_cast<uint32_t>(scale) & kPowerMask);
  return static_cast<float>(static_cast<int32_t>(power)) / kPowerOne;
}

// The constants of one group's expansion, which maps its elements to the values that are rounded to
// codes. Without expansion that map is a division by the scale.
struct Expander {
  float lift, power, offset;
};

template <class T>
QUAVER_HD Expander expander(float scale) {
  const float lift = group_lift(scale), power = power_of(scale);
  return {lift, power, Expansion<T>::log2_max - power * log2_coarse(scale * lift)};
}

// The expansion is split in two, so that a loop over elements overlaps the first halves.
QUAVER_HD float log2_expanded(const Expander& e, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x) & 0x7fffffffu;
  return fma(e.power, log2_coarse(bit_cast<float>(bits) * e.lift), e.offset);
}

// Of a number, without its sign. The floor is below any code, and a zero, too, is below it. The
// host chooses by bits, so that loops vectorise.
QUAVER_HD float expanded_number(float log2_y) {
  constexpr float floor = -40.0f;
#if defined(__CUDA_ARCH__)
  return exp2_coarse(at_least(log2_y, floor));
#else
  return exp2_coarse(bit_cast<float>(
      select(log2_y > floor, bit_cast<uint32_t>(log2_y), bit_cast<uint32_t>(floor))));
#endif
}

QUAVER_HD float expanded(float log2_y, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x) & 0x7fffffffu;
  const uint32_t y = bit_cast<uint32_t>(expanded_number(log2_y));
  return bit_cast<float>(select(bits > 0x7f800000u, 0x7fc00000u, y) |
                         (bit_cast<uint32_t>(x) & 0x80000000u));
}

QUAVER_HD float expand(const Expander& e, float x) { return expanded(log2_expanded(e, x), x); }

// A value that is not zero never rounds to zero: y, which x became in the format's domain, is
// raised to the smallest subnormal. A second moment that vanished where the first did not would
// leave m / eps for a step; one that is too large only makes the step smaller.
template <class T>
QUAVER_HD float keep_nonzero(float y, float x) {
  const uint32_t least = bit_cast<uint32_t>(
      1.0f / static_cast<float>(1u << (Format<T>::bias - 1 + Format<T>::mantissa)));
  const uint32_t bits = bit_cast<uint32_t>(y), magnitude = bits & 0x7fffffffu;
  const uint32_t kept = magnitude < least ? least : magnitude;
  const bool zero = (bit_cast<uint32_t>(x) & 0x7fffffffu) == 0u;
  return bit_cast<float>(select(zero, magnitude, kept) | (bits & 0x80000000u));
}

// log2(|code| / max) of a code without sign. Callers that decode many codes keep the 128
// results in a table.
template <class T>
QUAVER_HD float log2_of_code(uint32_t code) {
  return log2_coarse(decode(T{static_cast<uint8_t>(code)})) - log2_coarse(Format<T>::finite_max);
}

// A magnitude over its group's scale, of a code that is a number.
QUAVER_HD float contract_number(uint32_t code, float log2_code, float inverse_power) {
  const uint32_t x = bit_cast<uint32_t>(exp2_coarse(log2_code * inverse_power));
  return bit_cast<float>(select(code == 0u, 0u, x));
}

// The same of any code. Those above `max_code` are NaN.
QUAVER_HD float contract(uint32_t code, uint32_t max_code, float log2_code, float inverse_power) {
  const uint32_t x = bit_cast<uint32_t>(contract_number(code, log2_code, inverse_power));
  return bit_cast<float>(select(code > max_code, 0x7fc00000u, x));
}

// The bits of an f32 master beside its bf16 weight: the 16 that make an exact f32, or 8 that make a
// value of 24 bits, the f32 rounded to nearest even at 15 bits of mantissa.
struct Remainder {
  void* data = nullptr;
  int bytes = 0;  // of an element: 2, or 1; 0 for none
};

// The bits of a master. Every NaN has the same, because the payload that an operation on two NaNs
// leaves depends on the compiler.
QUAVER_HD uint32_t master_bits(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return select((bits & 0x7fffffffu) > 0x7f800000u, 0x7fc00000u, bits);
}
// As far as a bf16 and a Low, uint16_t or uint8_t, keep them.
template <class Low>
QUAVER_HD uint32_t master_bits(float x) {
  const uint32_t bits = master_bits(x);
  return sizeof(Low) == 2 ? bits : (bits + 0x7fu + (bits >> 8 & 1u)) & ~0xffu;
}

// Of such bits the bf16 is the nearest one, ties away from zero, and the rest is signed: with ties
// to even, the halfway values on both sides of an even bf16 would have the same bits.
QUAVER_HD bf16 master_high(uint32_t bits) {
  return bf16{static_cast<uint16_t>((bits + 0x8000u) >> 16)};
}
template <class Low>
QUAVER_HD Low master_low(uint32_t bits) {
  return static_cast<Low>(bits >> (16 - 8 * sizeof(Low)));
}
QUAVER_HD float join_master(bf16 high, uint16_t low) {
  return bit_cast<float>((uint32_t(high.bits) << 16) + low - (uint32_t(low & 0x8000u) << 1));
}
QUAVER_HD float join_master(bf16 high, uint8_t low) {
  return join_master(high, static_cast<uint16_t>(low << 8));
}

// A 16-bit weight over its scale, rounded up with the probability of the bits that the format
// lacks: steps far below half an ulp then move it in expectation, and nearest rounding would lose
// them all. `noise` is uniform; its upper bits decide.
template <class T>
QUAVER_HD T encode_weight_stochastic(float y, uint32_t noise) {
  if constexpr (std::is_same<T, bf16>::value) {
    const uint32_t bits = bit_cast<uint32_t>(y);
    const uint32_t up = bits + (noise >> 16);
    const bool special = (bits & 0x7f800000u) == 0x7f800000u;
    return bf16{static_cast<uint16_t>(select(special, encode_bf16(y).bits, up >> 16))};
  } else {
    return encode_stochastic<T>(y, noise >> (9 + Format<T>::mantissa));
  }
}

}  // namespace quaver
