// One value to and from e4m3, e5m2, f16 and bf16, by integer arithmetic that any compiler
// vectorises and that gives the same bits on every host and device.
//
// Encoding saturates as the hardware's `satfinite` conversions do: beyond the finite maximum,
// infinity included, it gives the finite maximum with x's sign. NaN gives the canonical NaN
// (all ones, sign clear), as cvt.rn.satfinite does. (OCP 8-bit Floating Point Specification 1.0;
// PTX ISA, cvt.)
#pragma once

#include <type_traits>

#include "quaver/dtype.h"

namespace quaver {

// bf16 has f32's range, so it does not saturate: infinity stays infinity.
QUAVER_HD bf16 encode_bf16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return bf16{static_cast<uint16_t>(select((bits & 0x7fffffffu) > 0x7f800000u, 0x7fffu, rounded))};
}

// e4m3, e5m2 and f16: round to nearest, ties to even, saturating.
template <class T>
QUAVER_HD T encode_format(float x) {
  using F = Format<T>;
  constexpr int drop = 23 - F::mantissa;
  constexpr uint32_t min_normal = uint32_t(127 + 1 - F::bias) << 23;
  // Adding a float whose ulp is the format's subnormal ulp makes the FPU round for us.
  constexpr uint32_t aligner = uint32_t(127 + 24 - F::bias - F::mantissa) << 23;
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 31) << (F::width - 1);
  const uint32_t odd = (magnitude >> drop) & 1u;
  const uint32_t normal = ((magnitude + ((1u << (drop - 1)) - 1u) + odd) >> drop) -
                          (uint32_t(127 - F::bias) << F::mantissa);
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + bit_cast<float>(aligner)) - aligner;
  uint32_t code = select(magnitude < min_normal, subnormal, normal);
  code = code < F::max_code ? code : F::max_code;
  code = select(magnitude > 0x7f800000u, F::nan_code, code | sign);
  return T{static_cast<typename F::Bits>(code)};
}

// Stochastic rounding: up with the probability of the dropped fraction, decided by the low
// 23 - mantissa bits of `random`. The expectation is x, except where it saturates.
template <class T>
QUAVER_HD T encode_stochastic(float x, uint32_t random) {
  using F = Format<T>;
  constexpr int drop = 23 - F::mantissa;
  constexpr uint32_t min_normal = uint32_t(127 + 1 - F::bias) << 23;
  // 2^(bias + 22) puts a subnormal's fraction where a normal float has it: `drop` bits below.
  constexpr uint32_t align = uint32_t(127 + F::bias + 22) << 23;
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 31) << (F::width - 1);
  const uint32_t noise = random & ((1u << drop) - 1u);
  const uint32_t normal = ((magnitude + noise) >> drop) - (uint32_t(127 - F::bias) << F::mantissa);
  const float small = bit_cast<float>(select(magnitude < min_normal, magnitude, 0u));
  const uint32_t fixed =
      static_cast<uint32_t>(static_cast<int32_t>(small * bit_cast<float>(align)));
  const uint32_t subnormal = (fixed + noise) >> drop;
  uint32_t code = select(magnitude < min_normal, subnormal, normal);
  code = code < F::max_code ? code : F::max_code;
  code = select(magnitude > 0x7f800000u, F::nan_code, code | sign);
  return T{static_cast<typename F::Bits>(code)};
}

// Exact. The subnormals come from a subtraction of two normal floats, not from a subnormal float,
// which is slow on CPUs and wrong where denormals are flushed.
template <class T>
QUAVER_HD float decode_format(T value) {
  using F = Format<T>;
  constexpr uint32_t rebias = uint32_t(127 - F::bias) << 23;
  constexpr uint32_t one = uint32_t(127 + 1 - F::bias) << 23;
  const uint32_t code = value.bits;
  const uint32_t sign = (code >> (F::width - 1)) << 31;
  const uint32_t low = code & ((1u << (F::width - 1)) - 1u);
  const uint32_t shifted = low << (23 - F::mantissa);
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(shifted + one) - bit_cast<float>(one));
  uint32_t bits = select(shifted < (1u << 23), subnormal, shifted + rebias);
  if (F::infinity_code < 0x80 || F::width == 16)  // formats with infinity: exponent all ones
    bits = select(low >= F::infinity_code, 0x7f800000u | (shifted & 0x7fffffu), bits);
  else
    bits = select(low == F::nan_code, 0x7fc00000u, bits);
  return bit_cast<float>(bits | sign);
}

QUAVER_HD float decode(e4m3 v) { return decode_format(v); }
QUAVER_HD float decode(e5m2 v) { return decode_format(v); }
QUAVER_HD float decode(f16 v) { return decode_format(v); }
QUAVER_HD float decode(bf16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }
QUAVER_HD float decode(float v) { return v; }

template <class T>
QUAVER_HD T encode_nearest(float x) {
  if constexpr (std::is_same<T, float>::value)
    return x;
  else if constexpr (std::is_same<T, bf16>::value)
    return encode_bf16(x);
  else
    return encode_format<T>(x);
}

}  // namespace quaver
