// Formats of less than 32 bits, written apart from the library's own: an oracle may not share its
// mistakes. NaN becomes the format's positive NaN with all bits set.
#pragma once

#include <cstdint>
#include <cstring>

namespace quaver::ptx {

struct Format {
  int mantissa, bias;
  uint32_t most;      // the code of the largest finite value
  uint32_t infinity;  // its code; `most` where the format has none
  uint32_t nan;
};

constexpr Format kF16 = {10, 15, 0x7bff, 0x7c00, 0x7fff};
constexpr Format kE4M3 = {3, 7, 0x7e, 0x7e, 0x7f};
constexpr Format kE5M2 = {2, 15, 0x7b, 0x7c, 0x7f};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// value >> shift, to the nearest and ties to even, or toward zero.
inline uint32_t shifted(uint32_t value, int shift, bool nearest) {
  if (shift == 0) return value;
  if (shift > 25) return 0;
  const uint32_t half = nearest ? (1u << (shift - 1)) - 1 + (value >> shift & 1) : 0;
  return (value + half) >> shift;
}

inline uint32_t encode(float x, const Format& f, bool nearest, bool saturates) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
  int width = 0;  // of the code without its sign
  while (f.nan >> width != 0) ++width;
  const uint32_t sign = (bits >> 31) << width;
  if (magnitude > 0x7f800000) return f.nan;
  const int exponent = static_cast<int>(magnitude >> 23) - 127, least = 1 - f.bias;
  const uint32_t significand = magnitude >> 23 == 0 ? 0 : (magnitude & 0x7fffff) | 0x800000;
  uint32_t code;
  if (magnitude == 0x7f800000)
    code = 0xffffffff;
  else if (exponent < least)
    code = shifted(significand, 23 - f.mantissa + least - exponent, nearest);
  else
    code = (static_cast<uint32_t>(exponent + f.bias - 1) << f.mantissa) +
           shifted(significand, 23 - f.mantissa, nearest);
  const bool infinite = magnitude == 0x7f800000;
  if (code > f.most) code = saturates || (!nearest && !infinite) ? f.most : f.infinity;
  return sign | code;
}

inline float decode(uint32_t code, const Format& f) {
  int width = 0;
  while (f.nan >> width != 0) ++width;
  const uint32_t sign = code >> width & 1, magnitude = code & f.nan;
  const uint32_t mantissa = magnitude & ((1u << f.mantissa) - 1);
  const int exponent = static_cast<int>(magnitude >> f.mantissa);
  if (f.infinity != f.most && magnitude == f.infinity) return float_of(sign << 31 | 0x7f800000);
  if (magnitude > f.most) return float_of(0x7fffffff);
  const float unit =
      float_of(static_cast<uint32_t>((exponent ? exponent : 1) - f.bias - f.mantissa + 127) << 23);
  const float value = static_cast<float>((exponent ? 1u << f.mantissa : 0) + mantissa) * unit;
  return sign ? -value : value;
}

inline uint32_t encode_bf16(float x, bool nearest) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return nearest ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16;
}

}  // namespace quaver::ptx
