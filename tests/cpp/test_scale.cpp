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
    record_amax(state, i == 3 ? 1000.0f : 10.0f);
  }
  CHECK_EQ(delayed_scale(state, kMax, true), scale_from_amax(1000.0f, kMax, true));
  // The large amax leaves the window after kHistory further casts, wherever the ring stands.
  for (int i = 0; i < 100; ++i) {
    record_amax(state, 10.0f);
    const float wanted = i < 3 ? 1000.0f : 10.0f;
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
