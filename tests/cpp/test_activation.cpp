// The accuracy that quaver/activation.h states, against f64, and its ends.
#include <algorithm>
#include <cmath>
#include <limits>

#include "quaver/activation.h"
#include "quaver/cast.h"
#include "quaver/philox.h"
#include "test.h"

using namespace quaver;

namespace {

const float kInfinity = std::numeric_limits<float>::infinity();
const float kNan = std::numeric_limits<float>::quiet_NaN();

double ulp(double x) { return std::ldexp(1.0, std::max(std::ilogb(x), -126) - 23); }

double sigmoid64(double x) { return 1.0 / (1.0 + std::exp(-x)); }
double normal64(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }
double tanh_argument(double x) { return 2.0 * std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x); }

// G(x) and G'(x)
struct Exact {
  double value, slope;
};

Exact exact(Activation kind, double x) {
  if (kind == Activation::silu) {
    const double s = sigmoid64(x);
    return {s, s * sigmoid64(-x)};
  }
  if (kind == Activation::gelu)
    return {normal64(x), std::exp(-x * x / 2.0) / std::sqrt(2.0 * M_PI)};
  const double u = tanh_argument(x), s = sigmoid64(u);
  return {s, s * sigmoid64(-u) * 2.0 * std::sqrt(2.0 / M_PI) * (1.0 + 0.134145 * x * x)};
}

float sample(uint64_t i, float range) {
  return range * (static_cast<float>(random_bits(5, i) >> 8) / 8388608.0f - 1.0f);
}

// Worst error of the gate in ulp where it is at least `smallest`, and of the derivative in units of
// 2^-23: a derivative has zeros, so its error is absolute.
template <Activation kind>
void check_gate(float range, double smallest, double value_ulp, double derivative_bound) {
  double value = 0.0, derivative = 0.0;
  for (uint64_t i = 0; i < 400000; ++i) {
    const float x = sample(i, range);
    const Exact wanted = exact(kind, x);
    const Gate got = gate<kind>(x);
    if (wanted.value >= smallest)
      value = std::max(value, std::fabs(got.value - wanted.value) / ulp(wanted.value));
    else
      CHECK(std::fabs(got.value - wanted.value) <= 2.0 * smallest);
    const double error = activation_slope<kind>(x) - (wanted.value + x * wanted.slope);
    derivative = std::max(derivative, std::fabs(error) * 8388608.0);
  }
  if (value > value_ulp) CHECK_EQ(value, value_ulp);
  if (derivative > derivative_bound) CHECK_EQ(derivative, derivative_bound);
}

template <Activation kind>
void check_ends() {
  CHECK_EQ(activate<kind>(0.0f), 0.0f);
  CHECK_EQ(activate<kind>(kInfinity), kInfinity);
  CHECK(std::isnan(activate<kind>(-kInfinity)));  // shows, as in torch
  CHECK(std::isnan(activate<kind>(kNan)));
  CHECK(std::isnan(activation_slope<kind>(kNan)));
  CHECK_EQ(activate<kind>(3e38f), 3e38f);
  CHECK_EQ(activate<kind>(-3e38f), 0.0f);
  CHECK_EQ(activation_slope<kind>(0.0f), 0.5f);
  for (const float x : {200.0f, 3e38f, kInfinity}) {
    CHECK_EQ(activation_slope<kind>(x), 1.0f);
    CHECK_EQ(activation_slope<kind>(-x), 0.0f);
  }
}

}  // namespace

TEST(silu) { check_gate<Activation::silu>(100.0f, 1e-37, 4.0, 4.0); }
TEST(gelu) { check_gate<Activation::gelu>(14.0f, 1e-37, 8.0, 4.0); }
TEST(gelu_tanh_near_zero) { check_gate<Activation::gelu_tanh>(3.0f, 1e-37, 16.0, 8.0); }
// The argument of the sigmoid is rounded: 2^-24 of it, relative to the gate.
TEST(gelu_tanh) { check_gate<Activation::gelu_tanh>(16.0f, 1e-37, 200.0, 8.0); }

TEST(the_value_of_a_sigmoid_alone_has_the_same_bits) {
  for (uint64_t i = 0; i < 2000000; ++i) {
    const uint32_t bits = static_cast<uint32_t>(random_bits(9, i));
    const float any = bit_cast<float>(bits), near = sample(i, 90.0f);
    for (const float x : {any, near})
      if (x == x) CHECK_EQ(sigmoid_value(x), sigmoid(x).value);
  }
  for (const float x : {-89.0f, -88.73f, -88.72f, 87.0f, 87.34f, 0.0f, kInfinity, -kInfinity})
    CHECK_EQ(sigmoid_value(x), sigmoid(x).value);
}

TEST(the_ends_of_silu) { check_ends<Activation::silu>(); }
TEST(the_ends_of_gelu) { check_ends<Activation::gelu>(); }
TEST(the_ends_of_gelu_tanh) { check_ends<Activation::gelu_tanh>(); }

TEST(gradients_of_a_product) {
  for (uint64_t i = 0; i < 1000; ++i) {
    const float x = sample(i, 8.0f), up = sample(i + 5000, 3.0f), g = sample(i + 9000, 2.0f);
    const Gradients d = activation_gradients<Activation::silu>(g, x, up);
    CHECK_EQ(d.x, g * up * activation_slope<Activation::silu>(x));
    CHECK_EQ(d.up, g * activate<Activation::silu>(x));
  }
}

TEST(a_group_takes_the_scale_of_its_amax) {
  auto check = [](uint32_t bits) {
    const float wanted = scale_from_amax(bit_cast<float>(bits), scale_max(DType::e4m3), true);
    CHECK_EQ(decode_e8m0(static_cast<uint8_t>(block_exponent(bits))), wanted);
  };
  for (uint32_t exponent = 0; exponent < 256; ++exponent)
    for (const uint32_t fraction : {0u, 1u, 0x5fffffu, 0x600000u, 0x600001u, 0x7fffffu})
      check(exponent << 23 | fraction);
  for (uint64_t i = 0; i < 1000000; ++i) check(random_bits(8, i) & 0x7fffffffu);
}

TEST(e8m0_keeps_every_power_of_two) {
  for (int e = -126; e <= 127; ++e) {
    const float scale = std::ldexp(1.0f, e);
    CHECK_EQ(decode_e8m0(static_cast<uint8_t>(e + 127)), scale);
    if (e < 127) CHECK_EQ(block_inverse(e + 127), 1.0f / scale);
  }
  CHECK_EQ(decode_e8m0(0), std::ldexp(1.0f, -127));
  CHECK(std::isnan(decode_e8m0(255)));
}
