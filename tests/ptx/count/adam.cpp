// Counts of the optimizers that keep moments.
#include "count.h"
#include "quaver/adam4.h"
#include "quaver/optimizer.h"

using namespace quaver;
using namespace quaver::test;

namespace {

constexpr int kBefore = 16;  // steps, before which moments are zero

// AdamW with moments of 4 bits. `least` are the bytes an element that must be moved.
void count_adam4(const char* name, DType type, Second second, double least) {
  quaver::Shape shape;
  shape.axes = 2;
  shape.size[0] = kShape.rows;
  shape.size[1] = kShape.cols;
  Buffer weight(size_of(type) * kElements), grad(size_of(type) * kElements);
  Buffer exp_avg(kElements / 2), exp_avg_sq(kElements / 2), scales(4 * group_count(kElements));
  Buffer scales_sq(4 * second_scale_count(second, shape, kElements));
  fill_small(&weight, type, kElements, 11);
  fill_small(&grad, type, kElements, 12);
  for (Buffer* b : {&exp_avg, &exp_avg_sq, &scales, &scales_sq})
    std::memset(b->data(), 0, b->size());
  float grad_amax = 4.0f;
  int64_t step = 0, skipped = 0;
  const double hyper[5] = {1e-3, 0.9, 0.95, 1e-8, 0.1};
  Adam4Parameter p;
  p.weight = values(weight, type);
  p.grad = values(grad, type);
  p.grad_amax = &grad_amax;
  p.exp_avg = exp_avg.data();
  p.exp_avg_scale = scales.as<float>();
  p.exp_avg_sq = second == Second::factor ? nullptr : exp_avg_sq.data();
  p.exp_avg_sq_scale = scales_sq.as<float>();
  p.second = second;
  p.shape = shape;
  p.step = &step;
  p.hyper = hyper;
  Buffer workspace(cuda::adam4_workspace_bytes(&p, 1));
  count(name, least, kBefore, [&] { cuda::adam4(&p, 1, &skipped, workspace.data(), nullptr); });
}

}  // namespace

// FP8-LM with its masters, which round stochastically as its recipe lets them.
TEST(adam) {
  Buffer weight(2 * kElements), exp_avg(kElements), exp_avg_sq(2 * kElements), grad(kElements),
      fp8(kElements), fp8_t(kElements);
  fill(&weight, DType::f16, kElements, 5);
  for (Buffer* b : {&exp_avg, &exp_avg_sq}) std::memset(b->data(), 0, b->size());
  for (int64_t i = 0; i < kElements; ++i) grad.data()[i] = uint8_t(random_bits(7, i) & 0xb7);
  float numbers[8] = {1, 1, 1, 1, 1, 1, 1, 1}, grad_amax = 4.0f;
  int64_t step = 0, skipped = 0;
  const double hyper[5] = {1e-3, 0.9, 0.95, 1e-8, 0.1};
  AdamParameter p;
  p.weight = {values(weight, DType::f16), numbers, numbers + 1};
  p.exp_avg = {values(exp_avg, DType::e4m3), numbers + 2, numbers + 3};
  p.exp_avg_sq = {values(exp_avg_sq, DType::f16), numbers + 4, numbers + 5};
  p.grad = values(grad, DType::e4m3);
  p.fp8 = values(fp8, DType::e4m3);
  p.fp8_t = view(fp8_t, DType::e4m3, kShape.cols, kShape.rows);
  p.fp8_scale = numbers + 6;
  p.grad_amax = &grad_amax;
  p.step = &step;
  p.hyper = hyper;
  p.stochastic = true;
  p.seed = 1;
  Buffer workspace(cuda::adam_workspace_bytes(&p, 1));
  count("adam fp8lm-o2", 13, kBefore,
        [&] { cuda::adam(&p, 1, &skipped, workspace.data(), nullptr); });
}

// COAT's expanded moments beside a bf16 weight.
TEST(adam_coat) {
  Buffer weight(2 * kElements), exp_avg(kElements), exp_avg_sq(kElements), grad(2 * kElements);
  Buffer scales(4 * group_count(kElements)), scales_sq(4 * group_count(kElements));
  fill_small(&weight, DType::bf16, kElements, 9);
  fill_small(&grad, DType::bf16, kElements, 10);
  for (Buffer* b : {&exp_avg, &exp_avg_sq, &scales, &scales_sq})
    std::memset(b->data(), 0, b->size());
  float grad_amax = 4.0f;
  int64_t step = 0, skipped = 0;
  const double hyper[5] = {1e-3, 0.9, 0.95, 1e-8, 0.1};
  AdamParameter p;
  p.weight = {values(weight, DType::bf16)};
  p.exp_avg = {values(exp_avg, DType::e4m3), scales.as<float>(), nullptr, Scaling::expand};
  p.exp_avg_sq = {values(exp_avg_sq, DType::e4m3), scales_sq.as<float>(), nullptr, Scaling::expand};
  p.grad = values(grad, DType::bf16);
  p.grad_amax = &grad_amax;
  p.step = &step;
  p.hyper = hyper;
  Buffer workspace(cuda::adam_workspace_bytes(&p, 1));
  count("adam coat", 10 + 16.0 / kGroup, kBefore,
        [&] { cuda::adam(&p, 1, &skipped, workspace.data(), nullptr); });
}

TEST(adam_4bit) {
  constexpr double scales = 8.0 / kGroup;
  count_adam4("adam 4 bits, blocks", DType::bf16, Second::block, 8 + 2 * scales);
  count_adam4("adam 4 bits of f32, blocks", DType::f32, Second::block, 14 + 2 * scales);
  // The largest values of rows and columns must be known before the first code, hence two reads of
  // gradients and second moments.
  count_adam4("adam 4 bits, rank 1", DType::bf16, Second::rank1, 10.5 + scales);
  count_adam4("adam 4 bits of f32, rank 1", DType::f32, Second::rank1, 18.5 + scales);
  count_adam4("adam 4 bits, factored", DType::bf16, Second::factor, 7 + scales);
}

// States in groups to and from values.
TEST(states) {
  Buffer x(4 * kElements), codes(kElements), scales(4 * group_count(kElements));
  fill_small(&x, DType::f32, kElements, 13);
  const StateView state = {values(codes, DType::e4m3), scales.as<float>(), nullptr,
                           Scaling::expand};
  count("encode_state f32, expanded", 5 + 4.0 / kGroup,
        [&] { cuda::encode_state(state, values(x, DType::f32), nullptr); });
  count("decode_state to f32, expanded", 5 + 4.0 / kGroup,
        [&] { cuda::decode_state(values(x, DType::f32), state, nullptr); });
}
