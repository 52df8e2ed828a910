// Every instruction set gives the bits of the portable code, at sizes around the vector widths.
#include <cmath>
#include <limits>

#include "every_isa.h"
#include "quaver/adam.h"
#include "quaver/fp8.h"
#include "quaver/optimizer.h"
#include "quaver/quantize.h"

namespace {

const int64_t kSizes[] = {0, 1, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 511, 513, 4097};

}  // namespace

TEST(quantize_and_dequantize) {
  for (const DType type : {DType::e4m3, DType::e5m2, DType::f16}) {
    for (const bool power_of_two : {true, false}) {
      for (const bool stochastic : {false, true}) {
        same_everywhere([&](Bytes* bytes) {
          for (const int64_t n : kSizes) {
            std::vector<float> x = some_values(n, 11), back(n);
            std::vector<uint16_t> q(n);
            float scale = 0.0f, amax = 0.0f;
            QuantizeOptions options;
            options.power_of_two = power_of_two;
            options.stochastic = stochastic;
            options.seed = 5;
            const TensorView codes = view(q.data(), type, 1, n);
            const TensorView s = view(&scale, DType::f32, 1, 1), a = view(&amax, DType::f32, 1, 1);
            cpu::quantize(codes, s, a, view(x.data(), DType::f32, 1, n), options, {});
            cpu::dequantize(view(back.data(), DType::f32, 1, n), codes, s, options.layout);
            append(bytes, q);
            append(bytes, back);
            append(bytes, std::vector<float>{scale, amax});
          }
        });
      }
    }
  }
}

// Every bf16 under a scale, and every code back.
void every_bf16_under(float scale) {
  const int64_t n = 1 << 16;
  std::vector<uint16_t> x(n), back(n);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<uint16_t>(i * 40503);  // kinds are mixed
  std::vector<uint16_t> ordered(n);                                         // and a run of each
  for (int64_t i = 0; i < n; ++i) ordered[i] = static_cast<uint16_t>(i);
  for (const DType type : {DType::e4m3, DType::e5m2}) {
    for (const auto* values : {&x, &ordered}) {
      same_everywhere([&](Bytes* bytes) {
        float amax = 0.0f;
        std::vector<uint8_t> q(n);
        const TensorView codes = view(q.data(), type, 1, n);
        const TensorView s = view(&scale, DType::f32, 1, 1), a = view(&amax, DType::f32, 1, 1);
        ScaleSource given;
        given.given = true;
        cpu::quantize(codes, s, a, view(const_cast<uint16_t*>(values->data()), DType::bf16, 1, n),
                      {}, given);
        for (int64_t i = 0; i < n; ++i) {
          const float v = decode(bf16{(*values)[i]}) / scale;
          CHECK_EQ(q[i], type == DType::e4m3 ? encode_nearest<e4m3>(v).bits
                                             : encode_nearest<e5m2>(v).bits);
        }
        float one = 1.0f;
        cpu::dequantize(view(back.data(), DType::bf16, 1, n), codes, view(&one, DType::f32, 1, 1),
                        {});
        append(bytes, q);
        append(bytes, back);
      });
    }
  }
}

// Scales in, at and beyond the range in which codes are made of words.
TEST(every_bf16_under_powers_of_two) {
  for (const int power : {-126, -125, -120, -60, -6, 0, 1, 6, 60, 110, 120, 126})
    every_bf16_under(std::ldexp(1.0f, power));
}

// The same of the range in which codes are looked up.
TEST(every_bf16_under_any_scale) {
  for (const float scale :
       {0.01f, 0.3f, 1.0000001f, 1.9999999f, 448.5f, 7e-36f, 3e-38f, 1e-30f, 1e30f, 2e36f, 3e38f})
    every_bf16_under(scale);
}

TEST(non_finite_values) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int64_t n = 201;  // whole registers, and a rest
  for (const DType type : {DType::e4m3, DType::e5m2, DType::f16}) {
    same_everywhere([&](Bytes* bytes) {
      for (const float bad : {infinity, -infinity, nan, -nan}) {
        for (const int64_t at : {0, 9, 130, 200}) {
          std::vector<float> x = some_values(n, 2);
          x[at] = bad;
          std::vector<uint16_t> q(n);
          float scale = 1.0f, amax = 0.0f;
          cpu::quantize(view(q.data(), type, 1, n), view(&scale, DType::f32, 1, 1),
                        view(&amax, DType::f32, 1, 1), view(x.data(), DType::f32, 1, n), {}, {});
          CHECK(!is_finite(amax));
          CHECK_EQ(scale, 1.0f);
          append(bytes, q);
        }
      }
    });
  }
}

TEST(cast_transpose) {
  same_everywhere([&](Bytes* bytes) {
    for (const int64_t rows : {1, 7, 8, 64, 65, 130}) {
      for (const int64_t cols : {1, 9, 64, 70, 513}) {
        std::vector<float> x = some_values(rows * cols, 3);
        std::vector<uint8_t> q(rows * cols), qt(rows * cols);
        float scale = 0.0f, amax = 0.0f;
        cpu::cast_transpose(view(q.data(), DType::e4m3, rows, cols),
                            view(qt.data(), DType::e4m3, cols, rows),
                            view(&scale, DType::f32, 1, 1), view(&amax, DType::f32, 1, 1),
                            view(x.data(), DType::f32, rows, cols), true, {});
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < cols; ++c) CHECK_EQ(q[r * cols + c], qt[c * rows + r]);
        append(bytes, q);
      }
    }
  });
}

// Matrices that are large enough to be written past the cache, with whole lines and without.
TEST(cast_transpose_of_large_matrices) {
  const int64_t rows = 2112, cols = 2050;
  const std::vector<float> x = some_values(rows * cols, 6);
  same_everywhere([&](Bytes* bytes) {
    for (const int64_t height : {rows, rows - 1}) {
      std::vector<uint8_t> q(height * cols), space(height * cols + 64);
      // The lines of `qt` begin where the cache's do.
      uint8_t* qt = space.data() + (64 - reinterpret_cast<uintptr_t>(space.data()) % 64);
      float scale = 0.0f, amax = 0.0f;
      cpu::cast_transpose(view(q.data(), DType::e4m3, height, cols),
                          view(qt, DType::e4m3, cols, height), view(&scale, DType::f32, 1, 1),
                          view(&amax, DType::f32, 1, 1),
                          view(const_cast<float*>(x.data()), DType::f32, height, cols), true, {});
      int64_t wrong = 0;
      for (int64_t r = 0; r < height; ++r)
        for (int64_t c = 0; c < cols; ++c) wrong += q[r * cols + c] != qt[c * height + r];
      CHECK_EQ(wrong, 0);
      append(bytes, q);
    }
  });
}

// With a master rounded to nearest, stochastically, and as a shard that begins inside a block of
// Philox.
TEST(adam_with_low_precision_states) {
  for (const int64_t n : kSizes)
    for (const int64_t first : {-1, 0, 6}) {
      same_everywhere([&](Bytes* bytes) {
        const std::vector<float> grad = some_values(n, 4);
        std::vector<f16> weight(n, f16{0x3c00}), exp_avg_sq(n, f16{0});
        std::vector<e4m3> exp_avg(n, e4m3{0});
        float scales[3] = {1.0f, 1.0f, 1.0f}, amaxes[3] = {1.0f, 0.0f, 0.0f};
        float grad_amax = 0.0f;
        for (const float g : grad) grad_amax = g > grad_amax ? g : -g > grad_amax ? -g : grad_amax;
        int64_t step = 0, skipped = 0;
        const double hyper[5] = {1e-3, 0.9, 0.95, 1e-8, 0.1};
        AdamParameter p;
        p.weight = {view(weight.data(), DType::f16, 1, n), &scales[0], &amaxes[0]};
        p.exp_avg = {view(exp_avg.data(), DType::e4m3, 1, n), &scales[1], &amaxes[1]};
        p.exp_avg_sq = {view(exp_avg_sq.data(), DType::f16, 1, n), &scales[2], &amaxes[2]};
        p.grad = view(const_cast<float*>(grad.data()), DType::f32, 1, n);
        p.grad_amax = &grad_amax;
        p.step = &step;
        p.hyper = hyper;
        p.stochastic = first >= 0;
        p.seed = 5;
        p.first_element = first < 0 ? 0 : first;
        for (int i = 0; i < 3; ++i) cpu::adam(&p, 1, &skipped);
        CHECK_EQ(step, 3);
        CHECK_EQ(skipped, 0);
        append(bytes, weight);
        append(bytes, exp_avg);
        append(bytes, exp_avg_sq);
        append(bytes, std::vector<float>(scales, scales + 3));
        append(bytes, std::vector<float>(amaxes, amaxes + 3));
      });
    }
}

// A shard draws the random bits that its elements have in the whole tensor.
TEST(a_shard_of_a_master_rounds_as_the_whole_does) {
  constexpr int64_t n = 700;
  for (const DType type : {DType::f16, DType::bf16}) {
    auto run = [&](const std::vector<int64_t>& cuts) {
      std::vector<float> grad = some_values(n, 4), m(n), v(n);
      std::vector<uint16_t> weight(n);
      for (int64_t i = 0; i < n; ++i) weight[i] = static_cast<uint16_t>(0x3800u + i);
      for (size_t k = 0; k + 1 < cuts.size(); ++k) {
        const int64_t begin = cuts[k], count = cuts[k + 1] - begin;
        float grad_amax = 1.0f;
        int64_t step = 4, skipped = 0;
        const double hyper[5] = {1e-3, 0.9, 0.95, 1e-8, 0.1};
        AdamParameter p;
        p.weight = {view(weight.data() + begin, type, 1, count)};
        p.exp_avg = {view(m.data() + begin, DType::f32, 1, count)};
        p.exp_avg_sq = {view(v.data() + begin, DType::f32, 1, count)};
        p.grad = view(grad.data() + begin, DType::f32, 1, count);
        p.grad_amax = &grad_amax;
        p.step = &step;
        p.hyper = hyper;
        p.stochastic = true;
        p.seed = 11;
        p.first_element = begin;
        cpu::adam(&p, 1, &skipped);
      }
      return weight;
    };
    const std::vector<uint16_t> whole = run({0, n});
    CHECK(run({0, 1, 130, 262, 515, n}) == whole);
  }
}

TEST(a_step_count_out_of_range_is_refused) {
  float grad_amax = 1.0f, one[3] = {1.0f, 1.0f, 1.0f};
  int64_t skipped = 0;
  const double hyper[5] = {1e-3, 0.9, 0.95, 1e-8, 0.1};
  AdamParameter p;
  p.weight = {view(&one[0], DType::f32, 1, 1)};
  p.exp_avg = {view(&one[1], DType::f32, 1, 1)};
  p.exp_avg_sq = {view(&one[2], DType::f32, 1, 1)};
  p.grad = view(&one[0], DType::f32, 1, 1);
  p.grad_amax = &grad_amax;
  p.hyper = hyper;
  for (int64_t step : {std::numeric_limits<int64_t>::max(), int64_t(-1)}) {
    p.step = &step;
    CHECK_THROWS(cpu::adam(&p, 1, &skipped), "a step count must be in [0, 2^63 - 1)");
  }
  CHECK_EQ(next_step(-5), 1);
  CHECK_EQ(next_step(0), 1);
  CHECK_EQ(next_step(std::numeric_limits<int64_t>::max()), std::numeric_limits<int64_t>::max());
}

TEST(states_in_groups) {
  for (const DType type : {DType::e4m3, DType::e5m2})
    for (const Scaling scaling : {Scaling::group, Scaling::expand})
      same_everywhere([&](Bytes* bytes) {
        for (const int64_t n : kSizes) {
          std::vector<float> x = some_values(n, 6), back(n), scales(group_count(n));
          std::vector<uint8_t> q(n);
          const StateView state = {view(q.data(), type, 1, n), scales.data(), nullptr, scaling};
          cpu::encode_state(state, view(x.data(), DType::f32, 1, n));
          cpu::decode_state(view(back.data(), DType::f32, 1, n), state);
          append(bytes, q);
          append(bytes, scales);
          append(bytes, back);
        }
      });
}

TEST(adam_with_states_in_groups) {
  for (const int64_t n : kSizes)
    for (const int further : {0, 1, 2})  // bytes of a master beside its bf16
      same_everywhere([&](Bytes* bytes) {
        const std::vector<float> grad = some_values(n, 4);
        std::vector<bf16> weight(n, bf16{0x3f80});
        std::vector<uint8_t> remainder(n * further, 0);
        std::vector<uint8_t> moments[2] = {std::vector<uint8_t>(n), std::vector<uint8_t>(n)};
        std::vector<float> scales[2] = {std::vector<float>(group_count(n), 1.0f),
                                        std::vector<float>(group_count(n), 1.0f)};
        float grad_amax = 1.0f;
        int64_t step = 0, skipped = 0;
        const double hyper[5] = {1e-3, 0.9, 0.95, 1e-8, 0.1};
        AdamParameter p;
        p.weight = {view(weight.data(), DType::bf16, 1, n)};
        p.exp_avg = {view(moments[0].data(), DType::e4m3, 1, n), scales[0].data(), nullptr,
                     Scaling::expand};
        p.exp_avg_sq = {view(moments[1].data(), DType::e5m2, 1, n), scales[1].data(), nullptr,
                        Scaling::expand};
        p.grad = view(const_cast<float*>(grad.data()), DType::f32, 1, n);
        p.grad_amax = &grad_amax;
        p.step = &step;
        p.hyper = hyper;
        p.remainder = {remainder.data(), further};
        p.stochastic = further == 0;
        p.seed = 3;
        p.first_element = 1;
        for (int i = 0; i < 3; ++i) cpu::adam(&p, 1, &skipped);
        CHECK_EQ(step, 3);
        append(bytes, weight);
        append(bytes, remainder);
        for (int k = 0; k < 2; ++k) {
          append(bytes, moments[k]);
          append(bytes, scales[k]);
        }
      });
}

// From any codes, NaN and negative second moments included, with groups of every magnitude.
void adam_with_moments_of_any_bits(Scaling scaling) {
  constexpr int64_t n = 40 * kGroup + 5;
  for (const DType type : {DType::e4m3, DType::e5m2})
    for (const bool clean : {false, true})
      same_everywhere([&](Bytes* bytes) {
        std::vector<float> grad = some_values(n, 7), weight = some_values(n, 8);
        std::vector<uint8_t> moments[2] = {std::vector<uint8_t>(n), std::vector<uint8_t>(n)};
        std::vector<float> scales[2] = {std::vector<float>(group_count(n)),
                                        std::vector<float>(group_count(n))};
        for (int64_t i = 0; i < n; ++i) {
          const uint32_t random = random_bits(9, i);
          const int exponent = static_cast<int>(i / kGroup) * 6 - 120;
          grad[i] = std::ldexp(grad[i], exponent / 2);
          moments[0][i] = static_cast<uint8_t>(clean ? random & 0xbb : random);
          moments[1][i] = static_cast<uint8_t>(clean ? random >> 8 & 0x3b : random >> 8);
          const uint32_t power = random >> 16 & 0xff;
          for (int k = 0; k < 2; ++k)
            scales[k][i / kGroup] = bit_cast<float>(
                (bit_cast<uint32_t>(std::ldexp(1.0f, k == 0 ? exponent / 2 : exponent)) & ~0xffu) |
                power);
        }
        float grad_amax = 1.0f, amaxes[2] = {1.0f, 1.0f};
        int64_t step = 0, skipped = 0;
        const double hyper[5] = {1e-3, 0.9, 0.95, 1e-8, 0.1};
        AdamParameter p;
        p.weight = {view(weight.data(), DType::f32, 1, n)};
        const bool tensor = scaling == Scaling::tensor;
        for (int k = 0; tensor && k < 2; ++k) scales[k][0] = 0.25f;
        p.exp_avg = {view(moments[0].data(), type, 1, n), scales[0].data(),
                     tensor ? amaxes : nullptr, scaling};
        p.exp_avg_sq = {view(moments[1].data(), type, 1, n), scales[1].data(),
                        tensor ? amaxes + 1 : nullptr, scaling};
        p.grad = view(grad.data(), DType::f32, 1, n);
        p.grad_amax = &grad_amax;
        p.step = &step;
        p.hyper = hyper;
        for (int i = 0; i < 3; ++i) {
          cpu::adam(&p, 1, &skipped);
          append(bytes, moments[0]);
          append(bytes, moments[1]);
          append(bytes, scales[0]);
          append(bytes, scales[1]);
        }
        // NaN has more than one pattern, and which one a sum gives is the compiler's choice.
        for (float& w : weight) w = w == w ? w : 0.0f;
        append(bytes, weight);
      });
}

TEST(adam_with_moments_of_any_bits_expanded) { adam_with_moments_of_any_bits(Scaling::expand); }
TEST(adam_with_moments_of_any_bits_in_groups) { adam_with_moments_of_any_bits(Scaling::group); }
TEST(adam_with_moments_of_any_bits_of_a_tensor) { adam_with_moments_of_any_bits(Scaling::tensor); }

TEST(an_unknown_instruction_set_is_refused_by_name) {
  CHECK_THROWS(cpu::set_isa("mmx"), "got mmx");
}
