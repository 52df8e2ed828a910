// Scale choice. One convention everywhere: x ~= scale * q, `scale` decodes.
#pragma once

#include "quaver/dtype.h"

namespace quaver {

// The smallest normal float: its reciprocal is finite, so x / scale cannot meet a zero.
constexpr float kMinScale = 1.17549435e-38f;  // 2^-126

// The smallest power of two that is >= x, for normal positive x.
QUAVER_HD float power_of_two_at_least(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t exponent = (bits >> 23) + ((bits & 0x7fffffu) != 0 ? 1u : 0u);
  return bit_cast<float>(exponent << 23);
}

QUAVER_HD bool is_power_of_two(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return (bits & 0x7fffffu) == 0 && bits >= (1u << 23) && bits < (254u << 23);
}

QUAVER_HD bool is_finite(float x) { return (bit_cast<uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }

// amax / finite_max, rounded up to a power of two where asked (FP8-LM's 2^floor(log2(max/amax)) in
// encode direction). An amax of 0, and one that is not finite, keeps `previous`, but for one that
// nothing can be divided by: a tensor that was multiplied by 0 has scale 0.
QUAVER_HD float scale_from_amax(float amax, float finite_max, bool power_of_two,
                                float previous = 1.0f) {
  if (!(amax > 0.0f) || !is_finite(amax))
    return is_finite(previous) && (previous >= kMinScale || previous <= -kMinScale) ? previous
                                                                                    : 1.0f;
  float scale = amax / finite_max;
  scale = scale < kMinScale ? kMinScale : scale;
  if (!power_of_two) return scale;
  scale = power_of_two_at_least(scale);
  // The division may have rounded down onto a power of two that is a hair too small.
  return scale * finite_max < amax ? scale * 2.0f : scale;
}

// Delayed scaling (FP8-LM, MS-AMP): just-in-time for the first kHistory casts, then from the
// maximum of the last kHistory amaxes. State: [0] casts recorded, [1..kHistory] ring of amaxes.
// The count runs 0..kHistory while warming up and then wraps within kHistory..2*kHistory-1.
constexpr int kHistory = 16;
constexpr int kHistoryState = kHistory + 1;

// The decode scale to use for the next cast, or 0 for just-in-time.
QUAVER_HD float delayed_scale(const float* state, float finite_max, bool power_of_two) {
  if (state[0] < float(kHistory)) return 0.0f;
  float amax = 0.0f;
  for (int i = 1; i <= kHistory; ++i) amax = amax < state[i] ? state[i] : amax;
  return scale_from_amax(amax, finite_max, power_of_two);
}

// A non-finite amax empties the history, which returns to just-in-time.
QUAVER_HD void record_amax(float* state, float amax) {
  if (!is_finite(amax)) {
    for (int i = 0; i < kHistoryState; ++i) state[i] = 0.0f;
    return;
  }
  const int count = static_cast<int>(state[0]);
  state[1 + count % kHistory] = amax;
  state[0] = static_cast<float>(count + 1 == 2 * kHistory ? kHistory : count + 1);
}

}  // namespace quaver
