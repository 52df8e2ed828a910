#include <cmath>
#include <limits>

#include "quaver/philox.h"
#include "quaver/scale.h"
#include "test.h"

using namespace quaver;

namespace {

const float kInfinity = std::numeric_limits<float>::infinity();
const float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kMax = Format<e4m3>::finite_max;

}  // namespace

TEST(a_scale_covers_its_amax_and_is_the_smallest_that_does) {
  for (uint64_t i = 0; i < 200000; ++i) {
    const float amax = bit_cast<float>(random_bits(3, i) & 0x7fffffffu);
    if (!(amax > 0.0f) || !is_finite(amax)) continue;
    const float scale = scale_from_amax(amax, kMax, true);
    CHECK(is_power_of_two(scale));
    CHECK(double(scale) * kMax >= amax);
    if (scale > kMinScale) CHECK(double(scale) / 2 * kMax < amax);
    const float plain = scale_from_amax(amax, kMax, false);
    CHECK(plain == kMinScale || std::fabs(double(plain) * kMax / amax - 1.0) < 1.2e-7);
  }
}

TEST(nothing_to_scale_keeps_the_previous_scale) {
  for (const float amax : {0.0f, kInfinity, kNan}) {
    CHECK_EQ(scale_from_amax(amax, kMax, true), 1.0f);
    CHECK_EQ(scale_from_amax(amax, kMax, true, 0.25f), 0.25f);
  }
}

TEST(delayed_scaling_warms_up_and_then_uses_the_largest_of_the_window) {
  float state[kHistoryState] = {};
  for (int i = 0; i < kHistory; ++i) {
    CHECK_EQ(delayed_scale(state, kMax, true), 0.0f);
    record_amax(state, i == 3 ? 100.0f : 10.0f);
  }
  CHECK_EQ(delayed_scale(state, kMax, true), scale_from_amax(100.0f, kMax, true));
  // The large amax leaves the window after kHistory further casts, wherever the ring stands.
  for (int i = 0; i < 100; ++i) {
    record_amax(state, 10.0f);
    const float wanted = i < 3 ? 100.0f : 10.0f;
    CHECK_EQ(delayed_scale(state, kMax, true), scale_from_amax(wanted, kMax, true));
  }
}

TEST(a_non_finite_amax_returns_to_just_in_time) {
  float state[kHistoryState] = {};
  for (int i = 0; i < 2 * kHistory; ++i) record_amax(state, 1.0f);
  record_amax(state, kNan);
  for (int i = 0; i < kHistory; ++i) {
    CHECK_EQ(delayed_scale(state, kMax, true), 0.0f);
    record_amax(state, 2.0f);
  }
  CHECK_EQ(delayed_scale(state, kMax, true), scale_from_amax(2.0f, kMax, true));
}

TEST(a_history_of_zeros_forecasts_nothing) {
  float state[kHistoryState] = {};
  for (int i = 0; i < 2 * kHistory; ++i) record_amax(state, 0.0f);
  CHECK_EQ(delayed_scale(state, kMax, true), 0.0f);
  record_amax(state, 1e-3f);
  CHECK_EQ(delayed_scale(state, kMax, true), scale_from_amax(1e-3f, kMax, true));
}

TEST(an_outlier_enters_the_history_as_sixteen_times_its_largest) {
  for (int before : {1, 5, kHistory, 3 * kHistory}) {
    float state[kHistoryState] = {};
    for (int i = 0; i < before; ++i) record_amax(state, 2.0f);
    record_amax(state, 2e6f);
    CHECK_EQ(largest_recorded(state), 2.0f * kForecast);
  }
}

TEST(a_forecast_is_stale_where_it_saturates_or_is_far_too_large) {
  const float scale = 0.25f, foreseen = scale * kMax;
  CHECK(is_stale(0.0f, 1.0f, kMax));
  CHECK(!is_stale(scale, foreseen, kMax));
  CHECK(is_stale(scale, foreseen * 1.001f, kMax));
  CHECK(!is_stale(scale, foreseen / kForecast, kMax));
  CHECK(is_stale(scale, foreseen / kForecast * 0.999f, kMax));
  CHECK(!is_stale(scale, 0.0f, kMax));
  CHECK(!is_stale(scale, kNan, kMax));
  CHECK(!is_stale(scale, kInfinity, kMax));
  CHECK(is_stale(1.0f, 3e38f, kMax));  // 16 x and below: no overflow decides
  CHECK(!is_stale(1.7e38f, 3e38f, kMax));
}

TEST(no_state_leads_outside_of_the_ring) {
  const float counts[] = {-1.0f, -15.0f, -1e30f, kNan, kInfinity, -kInfinity, 32.0f, 1e9f, 3e38f};
  for (float count : counts) {
    float memory[kHistoryState + 128];
    for (float& x : memory) x = 7.0f;
    float* state = memory + 64;
    state[0] = count;
    for (int i = 1; i <= kHistory; ++i) state[i] = i % 2 ? kNan : -kInfinity;
    CHECK_EQ(delayed_scale(state, kMax, true), 0.0f);
    record_amax(state, 3.0f);
    CHECK_EQ(state[0], 1.0f);
    CHECK_EQ(state[1], 3.0f);
    for (int i = 0; i < 64; ++i) CHECK_EQ(memory[i], 7.0f);
    for (int i = 64 + kHistoryState; i < kHistoryState + 128; ++i) CHECK_EQ(memory[i], 7.0f);
  }
}
