#include <algorithm>
#include <cmath>
#include <limits>

#include "quaver/math.h"
#include "quaver/philox.h"
#include "test.h"

using namespace quaver;

namespace {

const float kInfinity = std::numeric_limits<float>::infinity();
const float kNan = std::numeric_limits<float>::quiet_NaN();

double ulp(double x) { return std::ldexp(1.0, std::max(std::ilogb(x), -126) - 23); }

}  // namespace

TEST(exp2_is_within_two_ulp) {
  double worst = 0.0;
  for (uint64_t i = 0; i < 1000000; ++i) {
    const float x = -126.0f + 254.0f * static_cast<float>(random_bits(1, i) >> 8) / 16777216.0f;
    if (x >= 128.0f) continue;
    const double wanted = std::exp2(static_cast<double>(x));
    worst = std::max(worst, std::fabs(quaver::exp2(x) - wanted) / ulp(wanted));
  }
  CHECK(worst <= 2.0);
}

TEST(exp2_of_integers_is_exact) {
  for (int n = -126; n < 128; ++n) CHECK_EQ(quaver::exp2(float(n)), std::ldexp(1.0f, n));
}

TEST(exp2_at_its_ends) {
  CHECK_EQ(quaver::exp2(128.0f), kInfinity);
  CHECK_EQ(quaver::exp2(kInfinity), kInfinity);
  CHECK_EQ(quaver::exp2(-127.0f), 0.0f);
  CHECK_EQ(quaver::exp2(-kInfinity), 0.0f);
  CHECK(std::isnan(quaver::exp2(kNan)));
}

TEST(exp_is_within_two_ulp) {
  double worst = 0.0;
  for (uint64_t i = 0; i < 1000000; ++i) {
    const float x =
        -87.33654f + 176.0592f * static_cast<float>(random_bits(3, i) >> 8) / 16777216.0f;
    const double wanted = std::exp(static_cast<double>(x));
    if (wanted > 3.4028234e38) continue;
    worst = std::max(worst, std::fabs(quaver::exp(x) - wanted) / ulp(wanted));
  }
  CHECK(worst <= 2.0);
}

TEST(exp_at_its_ends) {
  CHECK_EQ(quaver::exp(0.0f), 1.0f);
  CHECK_EQ(quaver::exp(88.73f), kInfinity);
  CHECK_EQ(quaver::exp(3e38f), kInfinity);
  CHECK_EQ(quaver::exp(kInfinity), kInfinity);
  CHECK(quaver::exp(88.72f) < kInfinity);
  CHECK(quaver::exp(-87.336f) > 0.0f);
  CHECK_EQ(quaver::exp(-87.337f), 0.0f);
  CHECK_EQ(quaver::exp(-3e38f), 0.0f);
  CHECK_EQ(quaver::exp(-kInfinity), 0.0f);
  CHECK(std::isnan(quaver::exp(kNan)));
}

TEST(clamp_keeps_nan) {
  CHECK_EQ(clamp(-5.0f, -1.0f, 2.0f), -1.0f);
  CHECK_EQ(clamp(5.0f, -1.0f, 2.0f), 2.0f);
  CHECK_EQ(clamp(0.5f, -1.0f, 2.0f), 0.5f);
  CHECK_EQ(clamp(-kInfinity, -1.0f, 2.0f), -1.0f);
  CHECK(std::isnan(clamp(kNan, -1.0f, 2.0f)));
}

TEST(log2_is_within_two_ulp_or_an_absolute_bound) {
  for (uint64_t i = 0; i < 1000000; ++i) {
    const float x = bit_cast<float>(random_bits(2, i) & 0x7fffffffu);
    if (!(x > 0.0f) || std::isinf(x)) continue;
    const double wanted = std::log2(static_cast<double>(x));
    const double error = std::fabs(quaver::log2(x) - wanted);
    if (error > std::max(2.0 * ulp(wanted), 1.2e-7)) CHECK_EQ(quaver::log2(x), float(wanted));
  }
}

TEST(log2_at_its_ends) {
  CHECK_EQ(quaver::log2(0.0f), -kInfinity);
  CHECK_EQ(quaver::log2(1.0f), 0.0f);
  CHECK_EQ(quaver::log2(kInfinity), kInfinity);
  CHECK_EQ(quaver::log2(1.40129846e-45f), -149.0f);
  CHECK(std::isnan(quaver::log2(-1.0f)));
  CHECK(std::isnan(quaver::log2(kNan)));
}

TEST(integer_power_by_repeated_squaring) {
  CHECK_EQ(integer_power(0.5, 10), 1.0 / 1024.0);
  CHECK_EQ(integer_power(0.9, 0), 1.0);
  CHECK(std::fabs(integer_power(0.95, 1000) / std::pow(0.95, 1000) - 1.0) < 1e-13);
}
