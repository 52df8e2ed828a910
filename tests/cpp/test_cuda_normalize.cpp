// normalize and its backward of the CUDA backend, run on the host: the bits of the CPU backend.
#include "quaver/normalize.h"
#include "simt/fused.h"

using namespace quaver;
using namespace quaver::test;

namespace {

struct Case {
  Shape shape;
  bool centered = false, given = false;
  DType type = DType::bf16, to = DType::e4m3, parameter = DType::f32;
  bool affine = true;
  int64_t block = 32, skew = 0;
};

void check(const Case& c) {
  const int64_t rows = c.shape.rows, cols = c.shape.cols, n = rows * cols;
  Buffer x(n * size_of(c.type), c.skew * size_of(c.type));
  Buffer weight(cols * size_of(c.parameter), c.skew * size_of(c.parameter));
  Buffer bias(cols * size_of(c.parameter), c.skew * size_of(c.parameter));
  fill_small(&x, c.type, n, 31);
  fill_small(&weight, c.parameter, cols, 32);
  fill_small(&bias, c.parameter, cols, 33);
  const TensorView values = view(x, c.type, rows, cols);
  const TensorView w = c.affine ? view(weight, c.parameter, 1, cols) : TensorView{};
  const TensorView b = c.affine ? view(bias, c.parameter, 1, cols) : TensorView{};
  CastMemory wanted(c.shape, c.to, 0, 0xcd), got(c.shape, c.to, c.skew, 0x3b);
  GroupMemory saved(c.shape, c.block, 0, 0xcd), cuda_saved(c.shape, c.block, c.skew, 0x3b);
  std::vector<float> mean(rows, -1.0f), rstd(rows, -1.0f), cuda_mean(rows, -2.0f),
      cuda_rstd(rows, -2.0f);
  float *means = c.centered ? mean.data() : nullptr,
        *cuda_means = c.centered ? cuda_mean.data() : nullptr;
  if (!c.centered) cuda_mean = mean;
  cpu::normalize(wanted.cast(c.given), saved.grouped(), means, rstd.data(), values, w, b, 1e-5f);
  cuda::normalize(got.cast(c.given), cuda_saved.grouped(), cuda_means, cuda_rstd.data(), values, w,
                  b, 1e-5f, nullptr);
  check_same(wanted, got);
  check_same(saved, cuda_saved);
  CHECK(same_bits(mean, cuda_mean) && same_bits(rstd, cuda_rstd));

  Buffer dy(n * size_of(c.type), c.skew * size_of(c.type));
  fill_small(&dy, c.type, n, 34);
  const DType dx_type = c.parameter;
  Buffer dx(n * size_of(dx_type)), cuda_dx(n * size_of(dx_type), c.skew * size_of(dx_type), 0x3b);
  std::vector<float> dw(cols, -1.0f), db(cols, -1.0f), cuda_dw(cols, -2.0f), cuda_db(cols, -2.0f);
  Buffer workspace(cuda::normalize_backward_workspace_bytes(rows, cols));
  const TensorView grad = view(dy, c.type, rows, cols);
  cpu::normalize_backward(view(dx, dx_type, rows, cols), dw.data(), db.data(), grad,
                          saved.grouped(), means, rstd.data(), w);
  cuda::normalize_backward(view(cuda_dx, dx_type, rows, cols), cuda_dw.data(), cuda_db.data(), grad,
                           cuda_saved.grouped(), cuda_means, cuda_rstd.data(), w, workspace.data(),
                           nullptr);
  CHECK(dx.bytes() == cuda_dx.bytes());
  CHECK(same_bits(dw, cuda_dw) && same_bits(db, cuda_db));
  CHECK(cuda_dx.guards_hold() && workspace.guards_hold());
}

}  // namespace

TEST(every_shape) {
  for (const Shape& shape : kShapes)
    for (const bool centered : {false, true}) check({shape, centered});
}

TEST(around_a_tile_and_a_row_of_lanes) {
  for (const int64_t rows : {15, 16, 129})
    for (const int64_t cols : {16, 127, 128, 144, 511, 512, 528, 1025})
      check({{rows, cols}, true, cols % 2 == 0, DType::f32});
}

// Rows that backward keeps in registers, by each of its kernels, and one that is too long for each
// type.
TEST(long_rows) {
  for (const DType type : {DType::bf16, DType::f32})
    for (const int64_t cols : {1024, 1536, 2064, 4096, 4112})
      for (const bool centered : {false, true})
        check({{11, cols}, centered, true, type, DType::e4m3, type, cols != 1536, 128});
}

TEST(every_type) {
  for (const DType type : kFloats)
    for (const DType parameter : kFloats)
      for (const DType to : {DType::e4m3, DType::e5m2})
        check({{17, 160}, true, false, type, to, parameter});
}

TEST(every_block) {
  for (const int64_t block : {1, 7, 16, 32, 48, 64, 128, 256, 512, 1024, 5000})
    for (const int64_t cols : {560, 1040, 33})
      check({{5, cols}, false, true, DType::bf16, DType::e4m3, DType::bf16, true, block});
}

TEST(without_weight_and_bias) {
  check({{40, 200}, true, false, DType::bf16, DType::e4m3, DType::f32, false});
  check({{40, 200}, false, true, DType::bf16, DType::e4m3, DType::f32, false});
}

TEST(many_rows_use_every_strand) { check({{64 * 16 * 2 + 5, 20}, true, true}); }

TEST(views_that_are_not_aligned) {
  for (const int64_t skew : {1, 3, 8})
    check({{20, 160}, true, false, DType::bf16, DType::e4m3, DType::bf16, true, 32, skew});
}

TEST(orders) {
  in_every_order([] {
    check({{140, 300}, true, true});
    check({{140, 300}, false, false});
  });
}

TEST(what_is_not_finite) {
  constexpr int64_t rows = 9, cols = 80;
  for (const float bad : {INFINITY, -INFINITY, NAN}) {
    Buffer x(rows * cols * 4);
    fill_small(&x, DType::f32, rows * cols, 35);
    x.as<float>()[4 * cols + 3] = bad;
    CastMemory wanted({rows, cols}, DType::e4m3, 0, 0xcd), got({rows, cols}, DType::e4m3, 0, 0x3b);
    GroupMemory saved({rows, cols}, 32, 0, 0xcd), cuda_saved({rows, cols}, 32, 0, 0x3b);
    std::vector<float> rstd(rows), cuda_rstd(rows);
    const TensorView values = view(x, DType::f32, rows, cols);
    cpu::normalize(wanted.cast(false), saved.grouped(), nullptr, rstd.data(), values, {}, {}, 0.1f);
    cuda::normalize(got.cast(false), cuda_saved.grouped(), nullptr, cuda_rstd.data(), values, {},
                    {}, 0.1f, nullptr);
    CHECK(std::isnan(wanted.amax) && std::isnan(got.amax));
    CHECK(wanted.q.bytes() == got.q.bytes() && wanted.scale == got.scale);
    check_same(saved, cuda_saved);
    CHECK(std::isnan(rstd[4]) && std::isnan(cuda_rstd[4]));
  }
}

// Whole tiles and lanes of a sum, groups as wide as a tile and a forecast; edges beside them.
TEST(fast_paths) {
  constexpr Shape shape = {140, 1040};
  constexpr int64_t n = shape.rows * shape.cols;
  Buffer weight(shape.cols * 4);
  fill_small(&weight, DType::f32, shape.cols, 37);
  for (const float bad : {0.5f, INFINITY, NAN}) {
    Buffer x(n * 2);
    fill_small(&x, DType::bf16, n, 38);
    x.as<bf16>()[70 * shape.cols + 600] = encode_nearest<bf16>(bad);
    CastMemory wanted(shape, DType::e4m3, 0, 0xcd), got(shape, DType::e4m3, 0, 0x3b);
    wanted.history = got.history = std::vector<float>(kHistoryState, 3.0f);
    wanted.history[0] = got.history[0] = float(kHistory);
    GroupMemory saved(shape, 128, 0, 0xcd), cuda_saved(shape, 128, 0, 0x3b);
    std::vector<float> rstd(shape.rows), cuda_rstd(shape.rows);
    const TensorView values = view(x, DType::bf16, shape.rows, shape.cols);
    const TensorView w = view(weight, DType::f32, 1, shape.cols);
    cpu::normalize(wanted.cast(false), saved.grouped(), nullptr, rstd.data(), values, w, {}, 1e-5f);
    cuda::normalize(got.cast(false), cuda_saved.grouped(), nullptr, cuda_rstd.data(), values, w, {},
                    1e-5f, nullptr);
    CHECK(wanted.q.bytes() == got.q.bytes() && wanted.qt.bytes() == got.qt.bytes());
    CHECK(is_finite(bad) == is_finite(got.amax));
    if (is_finite(bad)) check_same(wanted, got);
    check_same(saved, cuda_saved);
    CHECK(is_finite(bad) == is_finite(cuda_rstd[70]));
    rstd[70] = cuda_rstd[70] = 0.0f;
    CHECK(same_bits(rstd, cuda_rstd));
  }
}

TEST(delayed_scaling) {
  constexpr Shape shape = {48, 80};
  CastMemory wanted(shape, DType::e4m3, 0, 0xcd), got(shape, DType::e4m3, 0, 0x3b);
  GroupMemory saved(shape, 32, 0, 0xcd), cuda_saved(shape, 32, 0, 0x3b);
  wanted.history = got.history = std::vector<float>(kHistoryState, 0.0f);
  std::vector<float> rstd(shape.rows), cuda_rstd(shape.rows);
  Buffer x(shape.rows * shape.cols * 2);
  for (int step = 0; step < 2 * kHistory; ++step) {
    fill_small(&x, DType::bf16, shape.rows * shape.cols, 200 + step);
    if (step == 18 || step == 22)  // a forecast that is far off, both ways
      for (CastMemory* m : {&wanted, &got}) rescale(&m->history, step == 18 ? 1e4f : 1e-5f);
    const TensorView values = view(x, DType::bf16, shape.rows, shape.cols);
    cpu::normalize(wanted.cast(false), saved.grouped(), nullptr, rstd.data(), values, {}, {}, 1.0f);
    cuda::normalize(got.cast(false), cuda_saved.grouped(), nullptr, cuda_rstd.data(), values, {},
                    {}, 1.0f, nullptr);
    check_same(wanted, got);
    check_same(saved, cuda_saved);
  }
}

TEST(wrong_arguments_are_named) {
  Buffer x(64 * 4), w(9 * 4);
  CastMemory y({4, 16}, DType::e4m3, 0, 0);
  GroupMemory saved({4, 16}, 32, 0, 0), other({4, 15}, 32, 0, 0);
  std::vector<float> rstd(4);
  const TensorView values = view(x, DType::f32, 4, 16);
  CHECK_THROWS(cuda::normalize(y.cast(true), other.grouped(), nullptr, rstd.data(), values, {}, {},
                               1.0f, nullptr),
               "normalize: xq must be [4, 16], got [4, 15]");
  CHECK_THROWS(cuda::normalize(y.cast(true), saved.grouped(), nullptr, rstd.data(), values,
                               view(w, DType::f32, 1, 9), {}, 1.0f, nullptr),
               "normalize: weight must have 16 values, got 9");
}
