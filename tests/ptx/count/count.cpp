// Counts what the kernels' PTX does, on shapes that cut nothing: a line of JSON for each case.
// bench/bench_ptx.py makes figures of them.
#include <cstdio>
#include <cstring>
#include <functional>

#include "driver.h"
#include "quaver/activate.h"
#include "quaver/adam4.h"
#include "quaver/codec.h"
#include "quaver/nf4.h"
#include "quaver/normalize.h"
#include "quaver/optimizer.h"
#include "quaver/quantize.h"
#include "simt/fused.h"
#include "test.h"

using namespace quaver;
using namespace quaver::test;

namespace {

constexpr test::Shape kShape = {256, 512};
constexpr int64_t kElements = kShape.rows * kShape.cols;
constexpr int64_t kBlock = 128;

// Prints the launches of `body`, which runs kHistory times before: casts are just in time until
// then, and moments would be zero. `least` are the bytes an element that must be read and written.
void count(const char* name, double least, const std::function<void()>& body) {
  for (int i = 0; i < kHistory; ++i) body();
  std::vector<ptx::Record> records;
  ptx::records = &records;
  body();
  ptx::records = nullptr;
  std::printf("{\"name\": \"%s\", \"elements\": %ld, \"least_bytes\": %g, \"launches\": [", name,
              long(kElements), least);
  for (const ptx::Record& r : records) {
    const ptx::Traffic& t = r.traffic;
    std::printf("%s{\"kernel\": \"%s\", \"instructions\": %lu, \"read\": %lu, \"written\": %lu, ",
                &r == records.data() ? "" : ", ", r.kernel.c_str(), (unsigned long)r.instructions,
                (unsigned long)t.read, (unsigned long)t.written);
    std::printf("\"sectors\": %lu, \"least_sectors\": %lu, \"passes\": %lu, \"least_passes\": %lu}",
                (unsigned long)t.sectors, (unsigned long)t.least_sectors, (unsigned long)t.passes,
                (unsigned long)t.least_passes);
  }
  std::printf("]}\n");
}

TensorView values(Buffer& b, DType type) { return view(b, type, kShape.rows, kShape.cols); }

}  // namespace

TEST(cast_transpose) {
  Buffer x(2 * kElements);
  fill_small(&x, DType::bf16, kElements, 1);
  CastMemory to(kShape, DType::e4m3, 0, 0);
  std::vector<float> scale(1), amax(1), history(kHistoryState);
  count("cast_transpose bf16 to e4m3, delayed", 4, [&] {
    cuda::cast_transpose(values(to.q, DType::e4m3),
                         view(to.qt, DType::e4m3, kShape.cols, kShape.rows), view(scale),
                         view(amax), values(x, DType::bf16), true,
                         to.workspace.with({false, history.data()}), nullptr);
  });
}

TEST(quantize) {
  Buffer x(2 * kElements), q(kElements), back(4 * kElements);
  fill_small(&x, DType::bf16, kElements, 1);
  CastWorkspace memory(kShape.rows, kShape.cols);
  std::vector<float> scale(1, 0.01f), amax(1);
  count("quantize bf16 to e4m3, given scale", 3, [&] {
    cuda::quantize(values(q, DType::e4m3), view(scale), view(amax), values(x, DType::bf16), {},
                   memory.with({true, nullptr}), nullptr);
  });
  count("dequantize e4m3 to f32", 5, [&] {
    cuda::dequantize(values(back, DType::f32), values(q, DType::e4m3), view(scale), {}, nullptr);
  });
}

TEST(activate) {
  Buffer x(2 * kElements), up(2 * kElements), dy(2 * kElements);
  for (Buffer* b : {&x, &up, &dy}) fill_small(b, DType::bf16, kElements, 2);
  CastMemory y(kShape, DType::e4m3, 0, 0), dx(kShape, DType::e5m2, 0, 0),
      dup(kShape, DType::e4m3, 0, 0);
  for (CastMemory* m : {&y, &dx, &dup}) m->history.assign(kHistoryState, 0.0f);
  GroupMemory x_saved(kShape, kBlock, 0, 0), up_saved(kShape, kBlock, 0, 0);
  const double saved = 1 + 1.0 / kBlock;
  count("activate SwiGLU bf16, delayed", 6 + 2 * saved, [&] {
    cuda::activate(y.cast(false), x_saved.grouped(), up_saved.grouped(), nullptr,
                   values(x, DType::bf16), values(up, DType::bf16), nullptr, Activation::silu,
                   nullptr);
  });
  count("activate_backward SwiGLU bf16, delayed", 6 + 2 * saved, [&] {
    cuda::activate_backward(dx.cast(false), dup.cast(false), values(dy, DType::bf16),
                            x_saved.grouped(), up_saved.grouped(), nullptr, Activation::silu,
                            nullptr);
  });
}

TEST(normalize) {
  Buffer x(2 * kElements), weight(4 * kShape.cols);
  fill_small(&x, DType::bf16, kElements, 3);
  fill_small(&weight, DType::f32, kShape.cols, 4);
  CastMemory y(kShape, DType::e4m3, 0, 0);
  y.history.assign(kHistoryState, 0.0f);
  GroupMemory saved(kShape, kBlock, 0, 0);
  std::vector<float> rstd(kShape.rows);
  count("normalize RMSNorm bf16, delayed", 5 + 1.0 / kBlock, [&] {
    cuda::normalize(y.cast(false), saved.grouped(), nullptr, rstd.data(), values(x, DType::bf16),
                    view(weight, DType::f32, 1, kShape.cols), {}, 1e-6f, nullptr);
  });
}

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
  count("adam fp8lm-o2", 13, [&] { cuda::adam(&p, 1, &skipped, workspace.data(), nullptr); });
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
  count("adam coat", 10 + 16.0 / kGroup,
        [&] { cuda::adam(&p, 1, &skipped, workspace.data(), nullptr); });
}

// Moments of 4 bits in blocks beside a bf16 weight.
TEST(adam_4bit) {
  Buffer weight(2 * kElements), exp_avg(kElements / 2), exp_avg_sq(kElements / 2);
  Buffer grad(2 * kElements);
  Buffer scales(4 * group_count(kElements)), scales_sq(4 * group_count(kElements));
  fill_small(&weight, DType::bf16, kElements, 11);
  fill_small(&grad, DType::bf16, kElements, 12);
  for (Buffer* b : {&exp_avg, &exp_avg_sq, &scales, &scales_sq})
    std::memset(b->data(), 0, b->size());
  float grad_amax = 4.0f;
  int64_t step = 0, skipped = 0;
  const double hyper[5] = {1e-3, 0.9, 0.95, 1e-8, 0.1};
  Adam4Parameter p;
  p.weight = values(weight, DType::bf16);
  p.grad = values(grad, DType::bf16);
  p.grad_amax = &grad_amax;
  p.exp_avg = exp_avg.data();
  p.exp_avg_scale = scales.as<float>();
  p.exp_avg_sq = exp_avg_sq.data();
  p.exp_avg_sq_scale = scales_sq.as<float>();
  p.shape.size[0] = kShape.rows;
  p.shape.size[1] = kShape.cols;
  p.shape.axes = 2;
  p.step = &step;
  p.hyper = hyper;
  Buffer workspace(cuda::adam4_workspace_bytes(&p, 1));
  count("adam 4 bits, blocks", 8 + 16.0 / kGroup,
        [&] { cuda::adam4(&p, 1, &skipped, workspace.data(), nullptr); });
}

TEST(nf4) {
  Buffer x(2 * kElements), codes(kElements / 2), absmax(4 * kElements / 64);
  fill_small(&x, DType::bf16, kElements, 8);
  const Nf4View to = {codes.data(), absmax.as<float>(), kElements, 64};
  count("nf4_encode bf16", 2.5 + 4.0 / 64,
        [&] { cuda::nf4_encode(to, values(x, DType::bf16), nullptr); });
  count("nf4_decode to bf16", 2.5 + 4.0 / 64,
        [&] { cuda::nf4_decode(values(x, DType::bf16), to, nullptr); });
}
