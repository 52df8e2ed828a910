// Adam of FP8-LM's states: every instruction set gives the bits of the portable code.
#include <cmath>

#include "every_isa.h"
#include "quaver/optimizer.h"

namespace {

// Of three blocks of values one has any bits, NaN, infinities and negative second moments among
// them, one also zeros and weights below the normal numbers, and one what training gives.
constexpr int64_t kBlock = 64, kCount = 96 * kBlock + 13;

struct States {
  std::vector<uint16_t> weight, exp_avg_sq;
  std::vector<uint8_t> exp_avg, fp8, fp8_t;
  float scale[3] = {0x1p-9f, 0x1p-12f, 0x1p-22f}, amax[3] = {50.0f, 0.1f, 0.01f};
};

States some_states() {
  States s;
  s.fp8.resize(kCount);
  s.fp8_t.resize(kCount);
  for (int64_t i = 0; i < kCount; ++i) {
    const uint32_t bits = random_bits(21, i), more = random_bits(22, i);
    const int64_t kind = i / kBlock % 3;
    uint32_t weight = bits & 0xffff, exp_avg = bits >> 16 & 0xff, exp_avg_sq = more & 0xffff;
    if (kind > 0) {
      weight = (weight & 0x83ff) | ((kind == 1 ? 0 : 8) + (more >> 16) % 16) << 10;
      exp_avg &= 0xf7;
      exp_avg_sq &= 0x77ff;
    }
    if (kind == 1 && bits % 7 == 0) weight = exp_avg = exp_avg_sq = 0;
    s.weight.push_back(static_cast<uint16_t>(weight));
    s.exp_avg.push_back(static_cast<uint8_t>(exp_avg));
    s.exp_avg_sq.push_back(static_cast<uint16_t>(exp_avg_sq));
  }
  return s;
}

void step_everywhere(DType grad_type, bool copies, int64_t first_element) {
  std::vector<uint32_t> grad(kCount);
  for (int64_t i = 0; i < kCount; ++i) grad[i] = random_bits(23, i);
  if (grad_type == DType::f32 || grad_type == DType::bf16) {
    const std::vector<float> values = some_values(kCount, 24);
    for (int64_t i = 0; i < kCount; ++i) {
      if (grad_type == DType::f32)
        grad[i] = bit_cast<uint32_t>(values[i]);
      else
        reinterpret_cast<bf16*>(grad.data())[i] = encode_bf16(values[i]);
    }
  }
  same_everywhere([&](Bytes* bytes) {
    States s = some_states();
    const float grad_scale = 0x1p-12f, grad_amax = 0.1f;
    int64_t step = 6, skipped = 0;
    const double hyper[5] = {1e-3, 0.9, 0.95, 1e-8, 0.1};
    AdamParameter p;
    p.weight = {view(s.weight.data(), DType::f16, 1, kCount), &s.scale[0], &s.amax[0]};
    p.exp_avg = {view(s.exp_avg.data(), DType::e4m3, 1, kCount), &s.scale[1], &s.amax[1]};
    p.exp_avg_sq = {view(s.exp_avg_sq.data(), DType::f16, 1, kCount), &s.scale[2], &s.amax[2]};
    p.grad = view(grad.data(), grad_type, 1, kCount);
    p.grad_scale = &grad_scale;
    p.grad_amax = &grad_amax;
    float copy_scale = 1.0f;
    if (copies) {
      p.fp8 = view(s.fp8.data(), DType::e4m3, 1, kCount);
      p.fp8_t = view(s.fp8_t.data(), DType::e4m3, kCount, 1);
      p.fp8_scale = &copy_scale;
    }
    p.step = &step;
    p.hyper = hyper;
    p.stochastic = true;
    p.seed = 5;
    p.first_element = first_element;
    for (int i = 0; i < 3; ++i) {
      cpu::adam(&p, 1, &skipped);
      append(bytes, s.weight);
      append(bytes, s.exp_avg);
      append(bytes, s.exp_avg_sq);
      append(bytes, s.fp8);
      append(bytes, s.fp8_t);
      append(bytes, std::vector<float>(s.scale, s.scale + 3));
      for (float amax : s.amax) append(bytes, std::vector<float>{std::isnan(amax) ? -1.0f : amax});
      for (float& amax : s.amax) amax = is_finite(amax) ? amax : 1.0f;
    }
    CHECK_EQ(skipped, 0);
  });
}

}  // namespace

TEST(gradients_of_every_type) {
  for (const DType type : {DType::f32, DType::bf16, DType::e4m3, DType::e5m2})
    for (const bool copies : {false, true}) step_everywhere(type, copies, 0);
}

// The lower half of an element's number wraps inside of the span.
TEST(elements_around_a_wrap) {
  step_everywhere(DType::e4m3, true, (int64_t(1) << 32) - 5 * kBlock - 7);
}
