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
// encode direction). An amax of 0, Inf or NaN keeps `previous`, unless that is subnormal, zero or
// not finite: then the scale is 1.
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

// Delayed scaling (FP8-LM, MS-AMP): just in time for the first kHistory casts, then from the
// maximum of the last kHistory amaxes. State: [0] casts recorded, [1..kHistory] ring of amaxes. The
// count runs 0..kHistory while warming up and then wraps within kHistory..2*kHistory-1; any other
// count means an empty history, so that no damaged state leads outside of the ring.
//
// A history is a forecast. A cast that would saturate under it, or whose amax is more than
// kForecast times below it, is made again, just in time. An amax that is more than kForecast times
// above the history enters it as that: one outlier leaves the next casts their scale, and values
// that grow for good are followed.
constexpr int kHistory = 16;
constexpr int kHistoryState = kHistory + 1;
constexpr float kForecast = 16.0f;

QUAVER_HD int casts_recorded(const float* state) {
  return state[0] >= 0.0f && state[0] < float(2 * kHistory) ? static_cast<int>(state[0]) : 0;
}

// The largest amax of the history; 0 where there is none.
QUAVER_HD float largest_recorded(const float* state) {
  float amax = 0.0f;
  for (int i = 1; i <= kHistory; ++i)
    amax = amax < state[i] && is_finite(state[i]) ? state[i] : amax;
  return amax;
}

// The decode scale that the history forecasts for the next cast, or 0 for just in time.
QUAVER_HD float delayed_scale(const float* state, float finite_max, bool power_of_two) {
  const float amax = largest_recorded(state);
  if (casts_recorded(state) < kHistory || amax == 0.0f) return 0.0f;
  return scale_from_amax(amax, finite_max, power_of_two);
}

// Whether a forecast scale is none (0), or too small or far too large for values of this amax.
QUAVER_HD bool is_stale(float scale, float amax, float finite_max) {
  if (scale == 0.0f) return true;
  const float foreseen = scale * finite_max;
  return amax > 0.0f && is_finite(amax) && (amax > foreseen || kForecast * amax < foreseen);
}

// The scale of a cast whose readers see no amax: NaN where a value was not finite. FP8 saturates an
// infinity to a number, which would pass for a sound one all the way into the weights.
QUAVER_HD float nan_unless_finite(float scale, float amax) { return scale + (amax - amax); }

// A non-finite amax empties the history, which returns to just in time.
QUAVER_HD void record_amax(float* state, float amax) {
  if (!is_finite(amax)) {
    for (int i = 0; i < kHistoryState; ++i) state[i] = 0.0f;
    return;
  }
  const int count = casts_recorded(state);
  const float most = kForecast * largest_recorded(state);
  state[1 + count % kHistory] = most > 0.0f && amax > most ? most : amax;
  state[0] = static_cast<float>(count + 1 == 2 * kHistory ? kHistory : count + 1);
}

}  // namespace quaver
