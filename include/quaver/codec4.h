// 4-bit codes of Adam's moments (Li, Chen & Zhu, arXiv 2309.01507, section 3). A code is nearest
// to x / scale, a tie going to the larger value; the scale is the largest magnitude of its block,
// so that x / scale is at most 1. Two codes are one byte, the even element's in the low bits.
#pragma once

#include "quaver/codec.h"

namespace quaver {

// x / scale. Where the largest magnitude is 0 there is nothing to divide.
QUAVER_HD float over_scale(float x, float scale) {
  const bool any = scale > 0.0f;
  const float y = x / bit_cast<float>(select(any, bit_cast<uint32_t>(scale), 0x3f800000u));
  return bit_cast<float>(select(any, bit_cast<uint32_t>(y), 0u));
}

// The first moment: the dynamic exponent map, from -0.8875 to 1 with 0 as code 7. Its magnitudes
// are finer near 0. There is no -1.
constexpr uint32_t kDynamicZero = 7;

QUAVER_HD constexpr float dynamic_magnitude(uint32_t k) {
  float x = 0.0f;
  x = k >= 1 ? 0.0055f : x;
  x = k >= 2 ? 0.0325f : x;
  x = k >= 3 ? 0.0775f : x;
  x = k >= 4 ? 0.2125f : x;
  x = k >= 5 ? 0.4375f : x;
  x = k >= 6 ? 0.6625f : x;
  x = k >= 7 ? 0.8875f : x;
  return k >= 8 ? 1.0f : x;
}

QUAVER_HD constexpr float decode_dynamic4(uint32_t code) {
  return code < kDynamicZero ? -dynamic_magnitude(kDynamicZero - code)
                             : dynamic_magnitude(code - kDynamicZero);
}

// 1 where a magnitude has reached a midpoint; subtracted rather than compared, which compilers turn
// into the fewest vector instructions.
QUAVER_HD int32_t reaches(int32_t magnitude, int32_t middle) {
  return static_cast<int32_t>(static_cast<uint32_t>(middle - 1 - magnitude) >> 31);
}

// Counts the midpoints below. Magnitudes are compared as integers, where one less lets a tie
// between negative values go to the larger.
QUAVER_HD uint32_t encode_dynamic4(float y) {
  const uint32_t bits = bit_cast<uint32_t>(y);
  const auto sign = static_cast<int32_t>(bits >> 31);
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu) - sign;
  int32_t k = 0;
  k += reaches(magnitude, 0x3b343958);           // (0 + 0.0055) / 2
  k += reaches(magnitude, 0x3c9ba5e3);           // (0.0055 + 0.0325) / 2
  k += reaches(magnitude, 0x3d6147ae);           // (0.0325 + 0.0775) / 2
  k += reaches(magnitude, 0x3e147ae2);           // (0.0775 + 0.2125) / 2
  k += reaches(magnitude, 0x3ea66666);           // (0.2125 + 0.4375) / 2
  k += reaches(magnitude, 0x3f0ccccd);           // (0.4375 + 0.6625) / 2
  k += reaches(magnitude, 0x3f466666);           // (0.6625 + 0.8875) / 2
  k += reaches(magnitude, 0x3f71999a) & ~-sign;  // (0.8875 + 1) / 2
  return static_cast<uint32_t>(static_cast<int32_t>(kDynamicZero) + (k ^ -sign) + sign);
}

// The second moment: sixteenths from 1 to 16. Without a code for 0 no element's root vanishes
// beside a first moment that does not.
QUAVER_HD constexpr float decode_linear4(uint32_t code) {
  return static_cast<float>(static_cast<int32_t>(code) + 1) / 16.0f;
}

// floor(16 y - 1/2), which is exact. The comparisons are false for NaN.
QUAVER_HD uint32_t encode_linear4(float y) {
  const float steps = 16.0f * y - 0.5f;
  const uint32_t positive = select(steps > 0.0f, bit_cast<uint32_t>(steps), 0u);
  const float most = bit_cast<float>(positive);
  const uint32_t limited = select(most < 15.0f, positive, bit_cast<uint32_t>(15.0f));
  return static_cast<uint32_t>(static_cast<int32_t>(bit_cast<float>(limited)));
}

}  // namespace quaver
