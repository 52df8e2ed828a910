#include <algorithm>
#include <cmath>
#include <vector>

#include "quaver/dither.h"
#include "test.h"

using namespace quaver;

// The known answers of MurmurHash3's 32-bit finalizer.
TEST(known_answers) {
  CHECK_EQ(mix_bits(0u), 0u);
  CHECK_EQ(mix_bits(1u), 0x514E28B7u);
  CHECK_EQ(mix_bits(0xFFFFFFFFu), 0x81F16F39u);
}

// The share of each of 256 bins is within five standard deviations of 1/256, for elements that
// follow each other, in steps and parameters that do.
TEST(noise_is_uniform_over_elements) {
  constexpr int n = 1 << 16, bins = 256;
  for (uint64_t seed = 1; seed < 4; ++seed)
    for (uint64_t step = 0; step < 4; ++step) {
      const Dither d = make_dither(seed, step);
      std::vector<int> weight(bins), moment(bins), both(bins);
      for (uint32_t i = 0; i < n; ++i) {
        const uint32_t start = dither_start(d, i, 0);
        const uint32_t w = weight_noise(d, start) >> 24, m = exp_avg_noise(d, start) >> 24;
        ++weight[w];
        ++moment[m];
        ++both[w / 16 * 16 + m / 16];
      }
      for (const auto& counts : {weight, moment, both})
        for (int count : counts) CHECK(std::abs(count - n / bins) < 5 * std::sqrt(n / bins));
    }
}

// Of T steps of one element the noise is below any x in x T of them, within
// 3 + (1 / ln phi + 1 / ln 2) ln T: Niederreiter's bound for multiples of the golden ratio phi
// ("Random Number Generation and Quasi-Monte Carlo Methods", theorem 3.4). Independent noise strays
// by sqrt(T).
TEST(noise_is_spread_evenly_over_steps) {
  constexpr int steps = 4096;
  for (uint32_t element = 0; element < 20; ++element) {
    std::vector<double> seen;
    for (uint64_t step = 0; step < steps; ++step) {
      const Dither d = make_dither(7, step);
      seen.push_back(weight_noise(d, dither_start(d, element, 0)) * 0x1p-32);
    }
    std::sort(seen.begin(), seen.end());
    double worst = 0;
    for (int i = 0; i < steps; ++i) worst = std::max(worst, std::fabs(seen[i] * steps - i));
    CHECK(worst < 3 + (1 / std::log(1.618) + 1 / std::log(2.0)) * std::log(steps));
  }
}

TEST(elements_and_parameters_start_elsewhere) {
  const Dither one = make_dither(1, 0), two = make_dither(2, 0), far = make_dither(1ull << 32, 0);
  CHECK(dither_start(one, 5, 0) != dither_start(one, 6, 0));
  CHECK(dither_start(one, 5, 0) != dither_start(one, 5, 1));
  CHECK(dither_start(one, 5, 0) != dither_start(two, 5, 0));
  CHECK(one.key != far.key);
}
