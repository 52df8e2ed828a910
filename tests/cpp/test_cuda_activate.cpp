// activate and its backward of the CUDA backend, run on the host: the bits of the CPU backend.
#include "quaver/activate.h"
#include "simt/fused.h"

using namespace quaver;
using namespace quaver::test;

namespace {

constexpr Activation kKinds[] = {Activation::silu, Activation::gelu, Activation::gelu_tanh};

struct Case {
  Shape shape;
  Activation kind = Activation::silu;
  bool gated = true, smooth = false, given = false;
  DType type = DType::bf16, to = DType::e4m3;
  int64_t block = 32, skew = 0;
};

void check(const Case& c) {
  const int64_t rows = c.shape.rows, cols = c.shape.cols, n = rows * cols;
  const int64_t bytes = n * size_of(c.type), skew = c.skew * size_of(c.type);
  Buffer x(bytes, skew), up(bytes, skew), dy(bytes, skew), scale(cols * 4, c.skew * 4);
  fill_small(&x, c.type, n, 41);
  fill_small(&up, c.type, n, 42);
  fill_small(&dy, c.type, n, 43);
  fill_small(&scale, DType::f32, cols, 44);
  const float* channels = c.smooth ? scale.as<float>() : nullptr;
  const TensorView values = view(x, c.type, rows, cols);
  const TensorView ups = c.gated ? view(up, c.type, rows, cols) : TensorView{};
  CastMemory wanted(c.shape, c.to, 0, 0xcd), got(c.shape, c.to, c.skew, 0x3b);
  GroupMemory x_saved(c.shape, c.block, 0, 0xcd), cuda_x_saved(c.shape, c.block, c.skew, 0x3b);
  GroupMemory up_saved(c.shape, c.block, 0, 0xcd), cuda_up_saved(c.shape, c.block, c.skew, 0x3b);
  const GroupedView u = c.gated ? up_saved.grouped() : GroupedView{};
  const GroupedView cuda_u = c.gated ? cuda_up_saved.grouped() : GroupedView{};
  std::vector<float> amax(cols, -1.0f), cuda_amax(cols, -1.0f);
  cpu::activate(wanted.cast(c.given), x_saved.grouped(), u, amax.data(), values, ups, channels,
                c.kind);
  cuda::activate(got.cast(c.given), cuda_x_saved.grouped(), cuda_u, cuda_amax.data(), values, ups,
                 channels, c.kind, nullptr);
  check_same(wanted, got);
  check_same(x_saved, cuda_x_saved);
  if (c.gated) check_same(up_saved, cuda_up_saved);
  CHECK(same_bits(amax, cuda_amax));

  CastMemory dx(c.shape, DType::e5m2, 0, 0xcd), cuda_dx(c.shape, DType::e5m2, c.skew, 0x3b);
  CastMemory dup(c.shape, c.to, 0, 0xcd), cuda_dup(c.shape, c.to, c.skew, 0x3b);
  const GemmCast none = {};
  const TensorView grad = view(dy, c.type, rows, cols);
  cpu::activate_backward(dx.cast(c.given), c.gated ? dup.cast(false) : none, grad,
                         x_saved.grouped(), u, channels, c.kind);
  cuda::activate_backward(cuda_dx.cast(c.given), c.gated ? cuda_dup.cast(false) : none, grad,
                          cuda_x_saved.grouped(), cuda_u, channels, c.kind, nullptr);
  check_same(dx, cuda_dx);
  if (c.gated) check_same(dup, cuda_dup);
}

}  // namespace

TEST(every_shape) {
  for (const Shape& shape : kShapes)
    for (const bool given : {false, true}) check({shape, Activation::silu, true, given, given});
}

TEST(every_kind_and_type) {
  for (const Activation kind : kKinds)
    for (const DType type : kFloats)
      for (const bool gated : {false, true})
        check({{17, 144}, kind, gated, !gated, false, type, gated ? DType::e4m3 : DType::e5m2});
}

TEST(around_a_tile) {
  for (const int64_t rows : {15, 16, 127, 128, 129})
    for (const int64_t cols : {16, 127, 128, 144, 257})
      check({{rows, cols}, Activation::gelu_tanh, cols != 16, rows % 2 == 0, false, DType::f32});
}

TEST(every_block) {
  for (const int64_t block : {1, 7, 16, 32, 48, 64, 128, 256, 1024, 5000})
    for (const int64_t cols : {304, 33, 1040})
      check({{5, cols},
             Activation::silu,
             true,
             false,
             block % 2 == 0,
             DType::bf16,
             DType::e4m3,
             block});
}

TEST(views_that_are_not_aligned) {
  for (const int64_t skew : {1, 3, 8})
    check({{20, 160}, Activation::silu, true, true, false, DType::bf16, DType::e4m3, 32, skew});
}

TEST(orders) {
  in_every_order([] {
    check({{140, 300}, Activation::silu, true, true, false});
    check({{140, 300}, Activation::gelu, false, true, true});
  });
}

// x and up as halves of one matrix: the bits that they have when each is dense.
TEST(halves_of_a_joint_matrix) {
  for (const Shape& shape : {Shape{20, 160}, Shape{130, 272}, Shape{5, 33}})
    for (const int64_t block : {7, 32, 128, 256}) {
      const int64_t rows = shape.rows, cols = shape.cols, n = rows * cols;
      Buffer joint(2 * n * 2), x(2 * n), up(2 * n);
      fill_small(&joint, DType::bf16, 2 * n, 51);
      for (int64_t i = 0; i < n; ++i) {
        const bf16* row = joint.as<bf16>() + i / cols * 2 * cols + i % cols;
        x.as<bf16>()[i] = row[0];
        up.as<bf16>()[i] = row[cols];
      }
      RowsView first = view(joint, DType::bf16, rows, cols);
      first.pitch = 2 * cols;
      RowsView second = first;
      second.data = joint.as<bf16>() + cols;
      CastMemory wanted(shape, DType::e4m3, 0, 0xcd), got(shape, DType::e4m3, 0, 0x3b);
      GroupMemory saved(shape, block, 0, 0xcd), half_saved(shape, block, 0, 0x3b);
      GroupMemory u(shape, block, 0, 0xcd), half_u(shape, block, 0, 0x3b);
      cpu::activate(wanted.cast(false), saved.grouped(), u.grouped(), nullptr,
                    view(x, DType::bf16, rows, cols), view(up, DType::bf16, rows, cols), nullptr,
                    Activation::silu);
      for (const bool on_cpu : {true, false}) {
        if (on_cpu)
          cpu::activate(got.cast(false), half_saved.grouped(), half_u.grouped(), nullptr, first,
                        second, nullptr, Activation::silu);
        else
          cuda::activate(got.cast(false), half_saved.grouped(), half_u.grouped(), nullptr, first,
                         second, nullptr, Activation::silu, nullptr);
        check_same(wanted, got);
        check_same(saved, half_saved);
        check_same(u, half_u);
      }
    }
}

// Both gradients side by side by one scale: the codes that each has alone by that scale.
TEST(joint_gradients) {
  for (const Shape& shape : {Shape{20, 160}, Shape{130, 272}, Shape{16, 16}, Shape{9, 4112}})
    for (const bool delayed : {false, true}) {
      const Shape both = {shape.rows, 2 * shape.cols};
      const int64_t n = shape.rows * shape.cols;
      Buffer x(2 * n), up(2 * n), dy(2 * n);
      fill_small(&x, DType::bf16, n, 61);
      fill_small(&up, DType::bf16, n, 62);
      fill_small(&dy, DType::bf16, n, 63);
      const auto values = [&](Buffer& b) { return view(b, DType::bf16, shape.rows, shape.cols); };
      CastMemory y(shape, DType::e4m3, 0, 0);
      GroupMemory saved(shape, 128, 0, 0), u(shape, 128, 0, 0);
      cpu::activate(y.cast(false), saved.grouped(), u.grouped(), nullptr, values(x), values(up),
                    nullptr, Activation::silu);
      CastMemory wanted(both, DType::e5m2, 0, 0xcd), got(both, DType::e5m2, 0, 0x3b);
      if (delayed)
        for (CastMemory* m : {&wanted, &got}) m->history.assign(kHistoryState, 0.0f);
      for (int turn = 0; turn < (delayed ? 18 : 1); ++turn) {
        cpu::activate_backward(wanted.cast(false), {}, values(dy), saved.grouped(), u.grouped(),
                               nullptr, Activation::silu);
        cuda::activate_backward(got.cast(false), {}, values(dy), saved.grouped(), u.grouped(),
                                nullptr, Activation::silu, nullptr);
        check_same(wanted, got);
      }
      CastMemory dx(shape, DType::e5m2, 0, 0), dup(shape, DType::e5m2, 0, 0);
      GemmCast one = dx.cast(true), other = dup.cast(true);
      *one.scale = *other.scale = wanted.scale;
      cpu::activate_backward(one, other, values(dy), saved.grouped(), u.grouped(), nullptr,
                             Activation::silu);
      CHECK(wanted.amax == std::max(dx.amax, dup.amax));
      for (int64_t i = 0; i < dx.rows * shape.cols; ++i) {
        const int64_t row = i / shape.cols, col = i % shape.cols;
        const uint8_t* codes = wanted.q.as<uint8_t>() + row * both.cols + col;
        CHECK(codes[0] == dx.q.as<uint8_t>()[i] && codes[shape.cols] == dup.q.as<uint8_t>()[i]);
      }
      std::vector<unsigned char> halves = dx.qt.bytes(), second = dup.qt.bytes();
      halves.insert(halves.end(), second.begin(), second.end());
      CHECK(wanted.qt.bytes() == halves);
    }
}

TEST(what_is_not_finite) {
  constexpr Shape shape = {9, 80};
  constexpr int64_t n = shape.rows * shape.cols;
  for (const float bad : {INFINITY, -INFINITY, NAN}) {
    for (const Activation kind : kKinds) {
      Buffer x(n * 4), up(n * 4);
      fill_small(&x, DType::f32, n, 45);
      fill_small(&up, DType::f32, n, 46);
      x.as<float>()[333] = bad;
      CastMemory wanted(shape, DType::e4m3, 0, 0xcd), got(shape, DType::e4m3, 0, 0x3b);
      GroupMemory saved(shape, 32, 0, 0xcd), cuda_saved(shape, 32, 0, 0x3b);
      GroupMemory u(shape, 32, 0, 0xcd), cuda_u(shape, 32, 0, 0x3b);
      const TensorView values = view(x, DType::f32, shape.rows, shape.cols);
      const TensorView ups = view(up, DType::f32, shape.rows, shape.cols);
      cpu::activate(wanted.cast(false), saved.grouped(), u.grouped(), nullptr, values, ups, nullptr,
                    kind);
      cuda::activate(got.cast(false), cuda_saved.grouped(), cuda_u.grouped(), nullptr, values, ups,
                     nullptr, kind, nullptr);
      CHECK(!is_finite(wanted.amax) && !is_finite(got.amax));
      CHECK(wanted.q.bytes() == got.q.bytes() && wanted.scale == got.scale);
      check_same(saved, cuda_saved);
    }
  }
}

// Whole tiles, groups as wide as they and a forecast; edges beside them.
TEST(fast_paths) {
  constexpr Shape shape = {260, 272};
  constexpr int64_t n = shape.rows * shape.cols;
  for (const float bad : {0.5f, INFINITY, NAN}) {
    for (const bool gated : {false, true}) {
      Buffer x(n * 2), up(n * 2);
      fill_small(&x, DType::bf16, n, 47);
      fill_small(&up, DType::bf16, n, 48);
      x.as<bf16>()[131 * shape.cols + 77] = encode_nearest<bf16>(bad);
      up.as<bf16>()[3 * shape.cols + 200] = encode_nearest<bf16>(bad);
      CastMemory wanted(shape, DType::e4m3, 0, 0xcd), got(shape, DType::e4m3, 0, 0x3b);
      wanted.history = got.history = std::vector<float>(kHistoryState, 3.0f);
      wanted.history[0] = got.history[0] = float(kHistory);
      GroupMemory saved(shape, 128, 0, 0xcd), cuda_saved(shape, 128, 0, 0x3b);
      GroupMemory u(shape, 128, 0, 0xcd), cuda_u(shape, 128, 0, 0x3b);
      const GroupedView none = {};
      const TensorView values = view(x, DType::bf16, shape.rows, shape.cols);
      const TensorView ups = gated ? view(up, DType::bf16, shape.rows, shape.cols) : TensorView{};
      cpu::activate(wanted.cast(false), saved.grouped(), gated ? u.grouped() : none, nullptr,
                    values, ups, nullptr, Activation::silu);
      cuda::activate(got.cast(false), cuda_saved.grouped(), gated ? cuda_u.grouped() : none,
                     nullptr, values, ups, nullptr, Activation::silu, nullptr);
      CHECK(wanted.q.bytes() == got.q.bytes() && wanted.qt.bytes() == got.qt.bytes());
      CHECK(is_finite(bad) == is_finite(got.amax));
      if (is_finite(bad)) check_same(wanted, got);
      check_same(saved, cuda_saved);
      if (gated) check_same(u, cuda_u);
    }
  }
}

// The same of both gradients, of numbers and of what is none in each input.
TEST(fast_paths_of_gradients) {
  constexpr Shape shape = {260, 272};
  constexpr int64_t n = shape.rows * shape.cols, place = 131 * shape.cols + 77;
  for (const Activation kind : kKinds)
    for (const float bad : {0.5f, INFINITY, NAN})
      for (int where = 0; where < 3; ++where) {  // dy, x or up
        Buffer x(n * 2), up(n * 2), dy(n * 2);
        Buffer* all[] = {&dy, &x, &up};
        for (int k = 0; k < 3; ++k) fill_small(all[k], DType::bf16, n, 50 + k);
        all[where]->as<bf16>()[place] = encode_nearest<bf16>(bad);
        CastMemory y(shape, DType::e4m3, 0, 0xcd);
        GroupMemory xs(shape, 128, 0, 0xcd), us(shape, 128, 0, 0xcd);
        cpu::activate(y.cast(false), xs.grouped(), us.grouped(), nullptr,
                      view(x, DType::bf16, shape.rows, shape.cols),
                      view(up, DType::bf16, shape.rows, shape.cols), nullptr, kind);
        CastMemory dx(shape, DType::e5m2, 0, 0xcd), cuda_dx(shape, DType::e5m2, 0, 0x3b);
        CastMemory dup(shape, DType::e4m3, 0, 0xcd), cuda_dup(shape, DType::e4m3, 0, 0x3b);
        for (CastMemory* m : {&dx, &cuda_dx, &dup, &cuda_dup}) {
          m->history.assign(kHistoryState, 3.0f);
          m->history[0] = float(kHistory);
        }
        const TensorView grad = view(dy, DType::bf16, shape.rows, shape.cols);
        cpu::activate_backward(dx.cast(false), dup.cast(false), grad, xs.grouped(), us.grouped(),
                               nullptr, kind);
        cuda::activate_backward(cuda_dx.cast(false), cuda_dup.cast(false), grad, xs.grouped(),
                                us.grouped(), nullptr, kind, nullptr);
        CHECK(dx.q.bytes() == cuda_dx.q.bytes() && dx.qt.bytes() == cuda_dx.qt.bytes());
        CHECK(dup.q.bytes() == cuda_dup.q.bytes() && dup.qt.bytes() == cuda_dup.qt.bytes());
        CHECK(is_finite(dx.amax) == is_finite(cuda_dx.amax));
        CHECK(is_finite(dup.amax) == is_finite(cuda_dup.amax));
        if (!is_finite(bad)) continue;
        check_same(dx, cuda_dx);
        check_same(dup, cuda_dup);
      }
}

TEST(delayed_scaling) {
  constexpr Shape shape = {48, 80};
  constexpr int64_t n = shape.rows * shape.cols;
  CastMemory y(shape, DType::e4m3, 0, 0xcd), cuda_y(shape, DType::e4m3, 0, 0x3b);
  CastMemory dx(shape, DType::e5m2, 0, 0xcd), cuda_dx(shape, DType::e5m2, 0, 0x3b);
  CastMemory dup(shape, DType::e5m2, 0, 0xcd), cuda_dup(shape, DType::e5m2, 0, 0x3b);
  GroupMemory xs(shape, 32, 0, 0xcd), cuda_xs(shape, 32, 0, 0x3b);
  GroupMemory us(shape, 32, 0, 0xcd), cuda_us(shape, 32, 0, 0x3b);
  const std::vector<float> empty(kHistoryState, 0.0f);
  for (CastMemory* m : {&y, &cuda_y, &dx, &cuda_dx, &dup, &cuda_dup}) m->history = empty;
  Buffer x(n * 2), up(n * 2);
  for (int step = 0; step < 2 * kHistory; ++step) {
    fill_small(&x, DType::bf16, n, 300 + step);
    fill_small(&up, DType::bf16, n, 400 + step);
    if (step == 20) dup.history = cuda_dup.history = empty;  // one known, the other not
    if (step == 18 || step == 22)  // a forecast that is far off, both ways
      for (CastMemory* m : {&y, &cuda_y, &dx, &cuda_dx})
        rescale(&m->history, step == 18 ? 1e4f : 1e-5f);
    std::vector<float> scale(shape.cols, 0.5f), amax(shape.cols), cuda_amax(shape.cols);
    const TensorView values = view(x, DType::bf16, shape.rows, shape.cols);
    const TensorView ups = view(up, DType::bf16, shape.rows, shape.cols);
    cpu::activate(y.cast(false), xs.grouped(), us.grouped(), amax.data(), values, ups, scale.data(),
                  Activation::silu);
    cuda::activate(cuda_y.cast(false), cuda_xs.grouped(), cuda_us.grouped(), cuda_amax.data(),
                   values, ups, scale.data(), Activation::silu, nullptr);
    check_same(y, cuda_y);
    check_same(xs, cuda_xs);
    check_same(us, cuda_us);
    CHECK(same_bits(amax, cuda_amax));
    cpu::activate_backward(dx.cast(false), dup.cast(false), ups, xs.grouped(), us.grouped(),
                           nullptr, Activation::silu);
    cuda::activate_backward(cuda_dx.cast(false), cuda_dup.cast(false), ups, cuda_xs.grouped(),
                            cuda_us.grouped(), nullptr, Activation::silu, nullptr);
    check_same(dx, cuda_dx);
    check_same(dup, cuda_dup);
  }
}

TEST(wrong_arguments_are_named) {
  Buffer x(64 * 4), up(64 * 2);
  CastMemory y({4, 16}, DType::e4m3, 0, 0), half({4, 16}, DType::f16, 0, 0);
  GroupMemory saved({4, 16}, 32, 0, 0);
  const TensorView values = view(x, DType::f32, 4, 16);
  const auto call = [&](const GemmCast& c, const TensorView& ups) {
    cuda::activate(c, saved.grouped(), saved.grouped(), nullptr, values, ups, nullptr,
                   Activation::silu, nullptr);
  };
  CHECK_THROWS(call(y.cast(true), view(up, DType::f16, 4, 16)), "up must be f32 like x, got f16");
  CHECK_THROWS(call(half.cast(true), {}), "activate: dtype must be e4m3 or e5m2, got f16");
}
