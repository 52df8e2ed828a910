// normalize, activate and its backward with scales of blocks, of the CUDA backend, run on the host:
// the bits of the CPU backend.
#include "quaver/activate.h"
#include "quaver/normalize.h"
#include "simt/fused.h"
#include "simt/layouts.h"

using namespace quaver;
using namespace quaver::test;

namespace {

constexpr Activation kKinds[] = {Activation::silu, Activation::gelu, Activation::gelu_tanh};

struct Case {
  Shape shape;
  bool centered = false;
  DType type = DType::bf16, to = DType::e4m3;
  bool tiles_t = true, power_of_two = true, affine = true;
  int64_t block = 128, skew = 0;
  float odd = 0.5f;
};

// A place in the second tile where there is one.
int64_t odd_place(const Shape& s) {
  return (s.rows - 1) * s.cols + (s.cols > 130 ? 130 : s.cols - 1);
}

void check_normalize(const Case& c) {
  const int64_t rows = c.shape.rows, cols = c.shape.cols, n = rows * cols;
  Buffer x(n * size_of(c.type), c.skew * size_of(c.type)), weight(cols * 4), bias(cols * 4);
  fill_small(&x, c.type, n, 31);
  if (c.type == DType::f32 && n > 0) x.as<float>()[odd_place(c.shape)] = c.odd;
  fill_small(&weight, DType::f32, cols, 32);
  fill_small(&bias, DType::f32, cols, 33);
  const TensorView values = view(x, c.type, rows, cols);
  const TensorView w = c.affine ? view(weight, DType::f32, 1, cols) : TensorView{};
  const TensorView b = c.affine && c.centered ? view(bias, DType::f32, 1, cols) : TensorView{};
  LayoutsMemory y(c.shape, c.to, c.tiles_t, c.power_of_two, c.skew);
  GroupMemory saved(c.shape, c.block, 0, 0xcd), cuda_saved(c.shape, c.block, c.skew, 0x3b);
  std::vector<float> mean(rows), rstd(rows), cuda_mean(rows), cuda_rstd(rows);
  float *means = c.centered ? mean.data() : nullptr,
        *cuda_means = c.centered ? cuda_mean.data() : nullptr;
  cpu::normalize_layouts(y.wanted(), saved.grouped(), means, rstd.data(), values, w, b, 1e-5f);
  cuda::normalize_layouts(y.got(), cuda_saved.grouped(), cuda_means, cuda_rstd.data(), values, w, b,
                          1e-5f, nullptr);
  y.check();
  check_same(saved, cuda_saved);
  if (!is_finite(c.odd)) {
    CHECK(rows == 0 || !is_finite(rstd.back()) == !is_finite(cuda_rstd.back()));
    return;
  }
  CHECK(same_bits(mean, cuda_mean) && same_bits(rstd, cuda_rstd));
}

void check_activate(const Case& c, Activation kind, bool gated, bool smooth) {
  const int64_t rows = c.shape.rows, cols = c.shape.cols, n = rows * cols;
  const int64_t bytes = n * size_of(c.type), skew = c.skew * size_of(c.type);
  Buffer x(bytes, skew), up(bytes, skew), dy(bytes, skew), scale(cols * 4, c.skew * 4);
  fill_small(&x, c.type, n, 41);
  fill_small(&up, c.type, n, 42);
  fill_small(&dy, c.type, n, 43);
  fill_small(&scale, DType::f32, cols, 44);
  if (c.type == DType::f32 && n > 0) {
    x.as<float>()[odd_place(c.shape)] = c.odd;
    dy.as<float>()[odd_place(c.shape)] = c.odd;
  }
  const float* channels = smooth ? scale.as<float>() : nullptr;
  const TensorView values = view(x, c.type, rows, cols), grad = view(dy, c.type, rows, cols);
  const TensorView ups = gated ? view(up, c.type, rows, cols) : TensorView{};
  LayoutsMemory y(c.shape, c.to, c.tiles_t, c.power_of_two, c.skew);
  GroupMemory x_saved(c.shape, c.block, 0, 0xcd), cuda_x_saved(c.shape, c.block, c.skew, 0x3b);
  GroupMemory up_saved(c.shape, c.block, 0, 0xcd), cuda_up_saved(c.shape, c.block, c.skew, 0x3b);
  const GroupedView u = gated ? up_saved.grouped() : GroupedView{};
  const GroupedView cuda_u = gated ? cuda_up_saved.grouped() : GroupedView{};
  std::vector<float> amax(cols, -1.0f), cuda_amax(cols, -1.0f);
  cpu::activate_layouts(y.wanted(), x_saved.grouped(), u, amax.data(), values, ups, channels, kind);
  cuda::activate_layouts(y.got(), cuda_x_saved.grouped(), cuda_u, cuda_amax.data(), values, ups,
                         channels, kind, nullptr);
  y.check();
  check_same(x_saved, cuda_x_saved);
  if (gated) check_same(up_saved, cuda_up_saved);
  if (is_finite(c.odd)) CHECK(same_bits(amax, cuda_amax));

  LayoutsMemory dx(c.shape, c.to, c.tiles_t, c.power_of_two, c.skew);
  LayoutsMemory dup(c.shape, c.to, c.tiles_t, c.power_of_two, c.skew);
  const LayoutsCast none = {};
  cpu::activate_backward_layouts(dx.wanted(), gated ? dup.wanted() : none, grad, x_saved.grouped(),
                                 u, channels, kind);
  cuda::activate_backward_layouts(dx.got(), gated ? dup.got() : none, grad, cuda_x_saved.grouped(),
                                  cuda_u, channels, kind, nullptr);
  dx.check();
  if (gated) dup.check();
}

}  // namespace

TEST(norms_of_every_shape) {
  for (const Shape& shape : kShapes)
    for (const bool centered : {false, true}) check_normalize({shape, centered});
}

TEST(activations_of_every_shape) {
  for (const Shape& shape : kShapes)
    check_activate({shape}, Activation::silu, true, shape.rows % 2 == 0);
}

TEST(around_a_tile) {
  for (const int64_t rows : {127, 129})
    for (const int64_t cols : {127, 144, 257}) {
      const Case c = {{rows, cols}, cols == 127, DType::f32, DType::e5m2, rows == 127, rows == 129};
      check_normalize(c);
      check_activate(c, Activation::gelu_tanh, cols != 127, rows == 127);
    }
}

TEST(every_kind_and_type) {
  for (const DType type : kFloats)
    for (const bool tiles_t : {false, true}) {
      check_normalize({{17, 144}, tiles_t, type, DType::e4m3, tiles_t, !tiles_t, !tiles_t});
      for (const Activation kind : kKinds)
        check_activate({{17, 144}, false, type, DType::e4m3, tiles_t}, kind, tiles_t, !tiles_t);
    }
}

TEST(every_block) {
  for (const int64_t block : {7, 32, 48, 128, 1024}) {
    const Case c = {{5, 1040}, true, DType::bf16, DType::e4m3, true, block != 48, true, block};
    check_normalize(c);
    check_activate(c, Activation::silu, true, false);
  }
}

TEST(views_that_are_not_aligned) {
  for (const int64_t skew : {1, 8}) {
    const Case c = {{20, 160}, true, DType::bf16, DType::e4m3, false, true, true, 32, skew};
    check_normalize(c);
    check_activate(c, Activation::gelu, true, true);
  }
}

TEST(what_is_not_finite) {
  for (const float bad : {INFINITY, -INFINITY, NAN})
    for (const bool tiles_t : {false, true}) {
      const Case c = {{140, 260}, false, DType::f32, DType::e4m3, tiles_t, true, true, 128, 0, bad};
      check_normalize(c);
      check_activate(c, Activation::silu, true, tiles_t);
    }
}

TEST(orders) {
  in_every_order([] {
    check_normalize({{140, 150}});
    check_activate({{140, 150}}, Activation::silu, true, true);
  });
}

TEST(wrong_arguments_are_named) {
  Buffer x(64 * 4);
  LayoutsMemory y({4, 16}, DType::e4m3, true, true, 0);
  GroupMemory saved({4, 16}, 128, 0, 0);
  std::vector<float> rstd(4);
  LayoutsCast rows = y.got();
  rows.tiles_t = false;
  rows.grain = Grain::row;
  const TensorView values = view(x, DType::f32, 4, 16);
  CHECK_THROWS(cuda::normalize_layouts(rows, saved.grouped(), nullptr, rstd.data(), values, {}, {},
                                       1.0f, nullptr),
               "normalize_layouts: granularity must be block");
  CHECK_THROWS(
      cuda::activate_layouts(y.got(), saved.grouped(), {}, nullptr, view(x, DType::f32, 4, 15), {},
                             nullptr, Activation::silu, nullptr),
      "activate_layouts: xq must be [4, 15], got [4, 16]");
}
