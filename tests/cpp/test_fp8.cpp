// Encoding against a search of the whole format in f64: an independent statement of what nearest,
// ties to even, saturating means.
#include <cmath>
#include <limits>
#include <vector>

#include "quaver/fp8.h"
#include "quaver/philox.h"
#include "test.h"

using namespace quaver;

namespace {

const float kInfinity = std::numeric_limits<float>::infinity();
const float kNan = std::numeric_limits<float>::quiet_NaN();

template <class T>
uint32_t encode_bits(float x) {
  return encode_nearest<T>(x).bits;
}

template <class T>
T from_code(uint32_t code) {
  return T{static_cast<decltype(T::bits)>(code)};
}

// Magnitudes of all finite codes, ascending, by the definition of the format.
template <class T>
std::vector<double> magnitudes() {
  using F = Format<T>;
  std::vector<double> values;
  for (uint32_t code = 0; code <= F::max_code; ++code) {
    const int exponent = static_cast<int>(code >> F::mantissa);
    const double fraction = code & ((1u << F::mantissa) - 1u);
    const double unit = std::ldexp(1.0, -F::mantissa);
    values.push_back(exponent == 0 ? std::ldexp(fraction * unit, 1 - F::bias)
                                   : std::ldexp(1.0 + fraction * unit, exponent - F::bias));
  }
  return values;
}

template <class T>
uint32_t search(const std::vector<double>& values, float x) {
  const double magnitude = std::fabs(static_cast<double>(x));
  const uint32_t sign = std::signbit(x) ? 1u << (Format<T>::width - 1) : 0u;
  size_t low = 0, high = values.size() - 1;
  if (magnitude >= values[high]) return sign | static_cast<uint32_t>(high);
  while (high - low > 1) {
    const size_t middle = (low + high) / 2;
    (values[middle] <= magnitude ? low : high) = middle;
  }
  const double below = magnitude - values[low], above = values[high] - magnitude;
  const bool up = above < below || (above == below && low % 2 == 1);
  return sign | static_cast<uint32_t>(up ? high : low);
}

template <class T>
void check_decode() {
  const std::vector<double> values = magnitudes<T>();
  for (uint32_t code = 0; code <= Format<T>::max_code; ++code) {
    CHECK_EQ(double(decode(from_code<T>(code))), values[code]);
    CHECK_EQ(encode_bits<T>(decode(from_code<T>(code))), code);
    const uint32_t negative = code | 1u << (Format<T>::width - 1);
    CHECK_EQ(double(decode(from_code<T>(negative))), -values[code]);
    CHECK_EQ(encode_bits<T>(decode(from_code<T>(negative))), negative);
  }
  CHECK_EQ(values.back(), double(Format<T>::finite_max));
  CHECK(std::isnan(decode(from_code<T>(Format<T>::nan_code))));
}

template <class T>
void check_encode() {
  const std::vector<double> values = magnitudes<T>();
  // Every tie and its two neighbours, then random bits of every magnitude.
  for (size_t i = 0; i + 1 < values.size(); ++i) {
    const float tie = static_cast<float>((values[i] + values[i + 1]) / 2);
    for (const float x : {tie, std::nextafter(tie, 0.0f), std::nextafter(tie, kInfinity)}) {
      CHECK_EQ(encode_bits<T>(x), search<T>(values, x));
      CHECK_EQ(encode_bits<T>(-x), search<T>(values, -x));
    }
  }
  for (uint64_t i = 0; i < 200000; ++i) {
    const float x = bit_cast<float>(random_bits(1, i));
    if (!std::isnan(x)) CHECK_EQ(encode_bits<T>(x), search<T>(values, x));
  }
}

template <class T>
void check_special() {
  using F = Format<T>;
  const uint32_t sign = 1u << (F::width - 1);
  CHECK_EQ(encode_bits<T>(kInfinity), F::max_code);
  CHECK_EQ(encode_bits<T>(-kInfinity), F::max_code | sign);
  CHECK_EQ(encode_bits<T>(std::numeric_limits<float>::max()), F::max_code);
  CHECK_EQ(encode_bits<T>(kNan), F::nan_code);
  CHECK_EQ(encode_bits<T>(-kNan), F::nan_code);
  CHECK_EQ(encode_bits<T>(0.0f), 0u);
  CHECK_EQ(encode_bits<T>(-0.0f), sign);
  CHECK_EQ(uint32_t(encode_stochastic<T>(kInfinity, ~0u).bits), F::max_code);
  CHECK_EQ(uint32_t(encode_stochastic<T>(kNan, 0u).bits), F::nan_code);
}

// Stochastic rounding gives one of the two neighbours, leaves what is exact alone, and its mean
// over every value of the bits that decide is x.
template <class T>
void check_stochastic() {
  const std::vector<double> values = magnitudes<T>();
  for (size_t i = 0; i < values.size(); ++i) {
    const float exact = static_cast<float>(values[i]);
    for (const uint32_t random : {0u, ~0u})
      CHECK_EQ(uint32_t(encode_stochastic<T>(exact, random).bits), uint32_t(i));
  }
  constexpr int drop = 23 - Format<T>::mantissa;
  for (size_t i = 0; i + 1 < values.size(); i += 1 + values.size() / 16) {
    const float x = static_cast<float>(values[i] + (values[i + 1] - values[i]) * 0.375);
    int64_t ups = 0;
    for (uint32_t random = 0; random < 1u << drop; ++random) {
      const uint32_t code = encode_stochastic<T>(x, random).bits;
      CHECK(code == i || code == i + 1);
      ups += code - uint32_t(i);
    }
    CHECK_EQ(double(ups) / (1 << drop), 0.375);
  }
}

}  // namespace

TEST(decode_e4m3) { check_decode<e4m3>(); }
TEST(decode_e5m2) { check_decode<e5m2>(); }
TEST(decode_f16) { check_decode<f16>(); }
TEST(encode_e4m3) { check_encode<e4m3>(); }
TEST(encode_e5m2) { check_encode<e5m2>(); }
TEST(encode_f16) { check_encode<f16>(); }
TEST(special_e4m3) { check_special<e4m3>(); }
TEST(special_e5m2) { check_special<e5m2>(); }
TEST(special_f16) { check_special<f16>(); }
TEST(stochastic_e4m3) { check_stochastic<e4m3>(); }
TEST(stochastic_e5m2) { check_stochastic<e5m2>(); }
TEST(stochastic_f16) { check_stochastic<f16>(); }

TEST(infinity_codes_decode_to_infinity) {
  CHECK_EQ(decode(e5m2{0x7c}), kInfinity);
  CHECK_EQ(decode(e5m2{0xfc}), -kInfinity);
  CHECK_EQ(decode(f16{0x7c00}), kInfinity);
  CHECK(std::isnan(decode(e5m2{0x7d})));
  CHECK(std::isnan(decode(e4m3{0xff})));
}

TEST(bf16_keeps_infinity_and_rounds_to_even) {
  CHECK_EQ(encode_bits<bf16>(kInfinity), 0x7f80u);
  CHECK_EQ(encode_bits<bf16>(kNan), 0x7fffu);
  CHECK_EQ(encode_bits<bf16>(bit_cast<float>(0x3f808000u)), 0x3f80u);
  CHECK_EQ(encode_bits<bf16>(bit_cast<float>(0x3f818000u)), 0x3f82u);
  CHECK_EQ(encode_bits<bf16>(bit_cast<float>(0x3f808001u)), 0x3f81u);
  for (uint32_t code = 0; code < 0x7f80; ++code)
    CHECK_EQ(encode_bits<bf16>(decode(from_code<bf16>(code))), code);
}
