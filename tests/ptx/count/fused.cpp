// Counts of norms and activations, whose results are cast with one scale or with those of blocks.
#include "count.h"
#include "quaver/activate.h"
#include "quaver/normalize.h"
#include "simt/layouts.h"

using namespace quaver;
using namespace quaver::test;

namespace {

constexpr int64_t kBlock = 128;
constexpr double kSaved = 1 + 1.0 / kBlock;  // bytes an element of a saved copy

// Codes in 1 x 128 blocks and, transposed, in tiles, with the scales of both.
constexpr double kLayouts = 2 + 4.0 / kScaleTile + 4.0 / (kScaleTile * kScaleTile);

LayoutsMemory layouts() { return {kShape, DType::e4m3, true, false, 0}; }

}  // namespace

TEST(activate) {
  Buffer x(2 * kElements), up(2 * kElements), dy(2 * kElements);
  for (Buffer* b : {&x, &up, &dy}) fill_small(b, DType::bf16, kElements, 2);
  CastMemory y(kShape, DType::e4m3, 0, 0), dx(kShape, DType::e5m2, 0, 0),
      dup(kShape, DType::e4m3, 0, 0);
  GroupMemory x_saved(kShape, kBlock, 0, 0), up_saved(kShape, kBlock, 0, 0);
  const auto forward = [&] {
    cuda::activate(y.cast(false), x_saved.grouped(), up_saved.grouped(), nullptr,
                   values(x, DType::bf16), values(up, DType::bf16), nullptr, Activation::silu,
                   nullptr);
  };
  const auto backward = [&] {
    cuda::activate_backward(dx.cast(false), dup.cast(false), values(dy, DType::bf16),
                            x_saved.grouped(), up_saved.grouped(), nullptr, Activation::silu,
                            nullptr);
  };
  // A scale just in time takes a second read of all inputs.
  count("activate SwiGLU bf16, just in time", 10 + 2 * kSaved, forward);
  count("activate_backward SwiGLU bf16, just in time", 8 + 4 * kSaved, backward);
  for (CastMemory* m : {&y, &dx, &dup}) m->history.assign(kHistoryState, 0.0f);
  count_delayed("activate SwiGLU bf16, delayed", 6 + 2 * kSaved, forward);
  count_delayed("activate_backward SwiGLU bf16, delayed", 6 + 2 * kSaved, backward);
}

TEST(activate_layouts) {
  Buffer x(2 * kElements), up(2 * kElements), dy(2 * kElements);
  for (Buffer* b : {&x, &up, &dy}) fill_small(b, DType::bf16, kElements, 2);
  LayoutsMemory y = layouts(), dx = layouts(), dup = layouts();
  GroupMemory x_saved(kShape, kBlock, 0, 0), up_saved(kShape, kBlock, 0, 0);
  count("activate_layouts SwiGLU bf16", 4 + 2 * kSaved + kLayouts, [&] {
    cuda::activate_layouts(y.got(), x_saved.grouped(), up_saved.grouped(), nullptr,
                           values(x, DType::bf16), values(up, DType::bf16), nullptr,
                           Activation::silu, nullptr);
  });
  count("activate_backward_layouts SwiGLU bf16", 2 + 2 * kSaved + 2 * kLayouts, [&] {
    cuda::activate_backward_layouts(dx.got(), dup.got(), values(dy, DType::bf16), x_saved.grouped(),
                                    up_saved.grouped(), nullptr, Activation::silu, nullptr);
  });
}

TEST(normalize) {
  Buffer x(2 * kElements), wide(4 * kElements), weight(4 * kShape.cols), dy(2 * kElements);
  Buffer dx(2 * kElements), wide_dx(4 * kElements);
  fill_small(&x, DType::bf16, kElements, 3);
  fill_small(&wide, DType::f32, kElements, 3);
  fill_small(&dy, DType::bf16, kElements, 5);
  fill_small(&weight, DType::f32, kShape.cols, 4);
  const TensorView input = values(x, DType::bf16), w = view(weight, DType::f32, 1, kShape.cols);
  CastMemory y(kShape, DType::e4m3, 0, 0);
  LayoutsMemory blocks = layouts();
  GroupMemory saved(kShape, kBlock, 0, 0);
  std::vector<float> rstd(kShape.rows), dweight(kShape.cols);
  const auto forward = [&](const TensorView& from) {
    cuda::normalize(y.cast(false), saved.grouped(), nullptr, rstd.data(), from, w, {}, 1e-6f,
                    nullptr);
  };
  count("normalize RMSNorm bf16, just in time", 4 + kSaved, [&] { forward(input); });
  count("normalize RMSNorm f32, just in time", 6 + kSaved,
        [&] { forward(values(wide, DType::f32)); });
  y.history.assign(kHistoryState, 0.0f);
  count_delayed("normalize RMSNorm bf16, delayed", 4 + kSaved, [&] { forward(input); });
  count("normalize_layouts RMSNorm bf16", 2 + kSaved + kLayouts, [&] {
    cuda::normalize_layouts(blocks.got(), saved.grouped(), nullptr, rstd.data(), input, w, {},
                            1e-6f, nullptr);
  });
  Buffer workspace(cuda::normalize_backward_workspace_bytes(kShape.rows, kShape.cols));
  const auto backward = [&](const TensorView& to) {
    cuda::normalize_backward(to, dweight.data(), nullptr, values(dy, DType::bf16), saved.grouped(),
                             nullptr, rstd.data(), w, workspace.data(), nullptr);
  };
  count("normalize_backward RMSNorm bf16", 4 + kSaved, [&] { backward(values(dx, DType::bf16)); });
  count("normalize_backward RMSNorm bf16 to f32", 6 + kSaved,
        [&] { backward(values(wide_dx, DType::f32)); });
}
