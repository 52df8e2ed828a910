// cast_transpose of the CUDA backend, run on the host: the bits of the CPU backend.
#include <cmath>
#include <limits>
#include <memory>

#include "quaver/cast.h"
#include "simt/cast_workspace.h"

using namespace quaver;
using namespace quaver::test;

namespace {

void check(const Shape& shape, DType from, DType to, bool given, int64_t skew = 0) {
  const int64_t rows = shape.rows, cols = shape.cols, n = rows * cols;
  Buffer x(n * size_of(from), skew * size_of(from));
  fill(&x, from, n, 23);
  const TensorView values = view(x, from, rows, cols);
  Buffer wanted(n), wanted_t(n), got(n, skew, 0x3b), got_t(n, skew, 0x3b);
  std::vector<float> scale(1, 0.37f), amax(1, -1.0f), cuda_scale = scale, cuda_amax(1, -2.0f);
  ScaleSource source;
  source.given = given;
  CastWorkspace memory(rows, cols);
  cpu::cast_transpose(view(wanted, to, rows, cols), view(wanted_t, to, cols, rows), view(scale),
                      view(amax), values, true, source);
  cuda::cast_transpose(view(got, to, rows, cols), view(got_t, to, cols, rows), view(cuda_scale),
                       view(cuda_amax), values, true, memory.with(source), nullptr);
  CHECK(wanted.bytes() == got.bytes());
  CHECK(wanted_t.bytes() == got_t.bytes());
  CHECK(same_bits(scale, cuda_scale) && same_bits(amax, cuda_amax));
  CHECK(got.guards_hold() && got_t.guards_hold() && memory.guards_hold());
}

}  // namespace

TEST(every_shape) {
  for (const Shape& shape : kShapes)
    for (const bool given : {false, true}) check(shape, DType::bf16, DType::e4m3, given);
}

TEST(around_a_tile) {
  for (const int64_t rows : {15, 16, 127, 128, 129, 256})
    for (const int64_t cols : {16, 112, 127, 128, 144, 257})
      check({rows, cols}, DType::f32, DType::e5m2, false);
}

TEST(every_type) {
  for (const DType from : {DType::f32, DType::f16, DType::bf16})
    for (const DType to : {DType::e4m3, DType::e5m2}) check({144, 160}, from, to, false);
}

TEST(views_that_are_not_aligned) {
  for (const int64_t skew : {1, 3, 8}) check({144, 160}, DType::bf16, DType::e4m3, false, skew);
}

TEST(orders) {
  in_every_order([] { check({200, 300}, DType::bf16, DType::e4m3, true); });
}

TEST(delayed_scaling) {
  constexpr int64_t rows = 48, cols = 80, n = rows * cols;
  Buffer x(2 * n), wanted(n), wanted_t(n), got(n), got_t(n);
  CastWorkspace memory(rows, cols);
  std::vector<float> history(kHistoryState, 0.0f), cuda_history = history;
  for (int step = 0; step < 2 * kHistory; ++step) {
    fill(&x, DType::bf16, n, 100 + step);
    if (step == 18 || step == 22)  // a forecast that is far off, both ways
      for (auto* h : {&history, &cuda_history}) rescale(h, step == 18 ? 1e4f : 1e-5f);
    std::vector<float> scale(1, -1.0f), amax(1, -1.0f), cuda_scale(1, -2.0f), cuda_amax(1, -2.0f);
    const TensorView from = view(x, DType::bf16, rows, cols);
    cpu::cast_transpose(view(wanted, DType::e5m2, rows, cols),
                        view(wanted_t, DType::e5m2, cols, rows), view(scale), view(amax), from,
                        true, {false, history.data()});
    cuda::cast_transpose(view(got, DType::e5m2, rows, cols), view(got_t, DType::e5m2, cols, rows),
                         view(cuda_scale), view(cuda_amax), from, true,
                         memory.with({false, cuda_history.data()}), nullptr);
    CHECK(wanted.bytes() == got.bytes() && wanted_t.bytes() == got_t.bytes());
    CHECK(same_bits(scale, cuda_scale) && same_bits(amax, cuda_amax));
    CHECK(same_bits(history, cuda_history));
  }
}

TEST(the_scale_of_a_value_that_is_not_finite_is_nan_where_asked) {
  constexpr int64_t rows = 144, cols = 160, n = rows * cols;
  constexpr float infinity = std::numeric_limits<float>::infinity();
  for (const bool delayed : {false, true})
    for (const float odd : {1.0f, infinity, -infinity, std::nanf("")}) {
      Buffer x(4 * n), wanted(n), wanted_t(n), got(n), got_t(n);
      CastWorkspace memory(rows, cols);
      auto* values = reinterpret_cast<float*>(x.data());
      for (int64_t i = 0; i < n; ++i) values[i] = static_cast<float>(i % 37 - 18);
      values[n / 2] = odd;
      std::vector<float> history(kHistoryState, 0.0f), cuda_history = history;
      std::vector<float> scale(1), amax(1), cuda_scale(1), cuda_amax(1);
      const TensorView from = view(x, DType::f32, rows, cols);
      const DType to = DType::e4m3;
      cpu::cast_transpose(view(wanted, to, rows, cols), view(wanted_t, to, cols, rows), view(scale),
                          view(amax), from, true,
                          {false, delayed ? history.data() : nullptr, true});
      cuda::cast_transpose(
          view(got, to, rows, cols), view(got_t, to, cols, rows), view(cuda_scale), view(cuda_amax),
          from, true, memory.with({false, delayed ? cuda_history.data() : nullptr, true}), nullptr);
      CHECK(std::isnan(scale[0]) == !std::isfinite(odd));
      CHECK(std::isnan(cuda_scale[0]) == std::isnan(scale[0]));
      CHECK(std::isnan(scale[0]) || same_bits(scale, cuda_scale));
      CHECK(wanted.bytes() == got.bytes() && wanted_t.bytes() == got_t.bytes());
      CHECK(same_bits(history, cuda_history));
    }
}

namespace {

// One cast of a list, and what the CPU makes of it.
struct Listed {
  Shape shape;
  DType from, to;
  bool given, both;
  Buffer x, wanted, wanted_t, got, got_t;
  CastWorkspace memory;
  std::vector<float> history, cuda_history, scale, cuda_scale, amax, cuda_amax;

  Listed(const Shape& s, DType from, DType to, bool given, bool both, const float* forecast)
      : shape(s),
        from(from),
        to(to),
        given(given),
        both(both),
        x(s.rows * s.cols * size_of(from)),
        wanted(s.rows * s.cols),
        wanted_t(s.rows * s.cols),
        got(s.rows * s.cols, 0, 0x3b),
        got_t(s.rows * s.cols, 0, 0x3b),
        memory(s.rows, s.cols),
        scale(1, 0.5f),
        cuda_scale(scale),
        amax(1),
        cuda_amax(1) {
    fill(&x, from, s.rows * s.cols, 41);
    if (forecast != nullptr) history.assign(kHistoryState, *forecast);
    if (forecast != nullptr) history[0] = kHistory;
    cuda_history = history;
  }
  MatrixJob job(bool with_amax) {
    float* state = cuda_history.empty() ? nullptr : cuda_history.data();
    MatrixJob m;
    m.to.q = view(got, to, shape.rows, shape.cols);
    if (both) m.to.qt = view(got_t, to, shape.cols, shape.rows);
    m.to.scale = cuda_scale.data();
    m.to.amax = with_amax ? cuda_amax.data() : nullptr;
    m.to.source = memory.with({given, state, true});
    m.x = view(x, from, shape.rows, shape.cols);
    return m;
  }
  void check() {
    float* state = history.empty() ? nullptr : history.data();
    cpu::cast_transpose(view(wanted, to, shape.rows, shape.cols),
                        view(wanted_t, to, shape.cols, shape.rows), view(scale), view(amax),
                        view(x, from, shape.rows, shape.cols), true, {given, state, true});
    CHECK(wanted.bytes() == got.bytes());
    CHECK(!both || wanted_t.bytes() == got_t.bytes());
    CHECK(same_bits(scale, cuda_scale) && same_bits(history, cuda_history));
    CHECK(got.guards_hold() && got_t.guards_hold() && memory.guards_hold());
  }
};

}  // namespace

// Every pair of ways to choose a scale, with sizes that take one tile and several.
TEST(two_matrices_in_the_launches_of_one) {
  const float right = 1e10f, stale = 1e-3f;
  const auto make = [&](int way, const Shape& s, DType from, DType to, bool both) {
    const float* forecast = way == 2 ? &right : way == 3 ? &stale : nullptr;
    return std::make_unique<Listed>(s, from, to, way == 0, both, forecast);
  };
  for (int a = 0; a < 4; ++a)
    for (int b = 0; b < 4; ++b)
      for (const bool with_amax : {false, true}) {
        const auto one = make(a, {144, 272}, DType::bf16, DType::e4m3, with_amax);
        const auto two = make(b, {32, 400}, a == b ? DType::f32 : DType::bf16, DType::e5m2, true);
        const MatrixJob jobs[] = {one->job(with_amax), two->job(with_amax)};
        int launches = 0;
        simt::control.seen = [&](const char*, int64_t) { ++launches; };
        cuda::cast_matrices(jobs, 2, nullptr);
        simt::control.seen = nullptr;
        one->check();
        two->check();
        if (with_amax) {
          CHECK(same_bits(one->amax, one->cuda_amax));
          CHECK(same_bits(two->amax, two->cuda_amax));
        } else if (a != b) {
          CHECK_EQ(launches, 2);
        }
      }
}

TEST(wrong_arguments_are_named) {
  Buffer x(64), q(16), qt(16);
  std::vector<float> scale(1), amax(1);
  CHECK_THROWS(
      cuda::cast_transpose(view(q, DType::e4m3, 2, 8), view(qt, DType::e4m3, 2, 8), view(scale),
                           view(amax), view(x, DType::f32, 2, 8), true, {}, nullptr),
      "qt must be [8, 2], got [2, 8]");
  CHECK_THROWS(
      cuda::cast_transpose(view(q, DType::e4m3, 2, 8), view(qt, DType::e4m3, 8, 2), view(scale),
                           view(amax), view(x, DType::f32, 2, 8), true, {}, nullptr),
      "a cast that looks for the amax needs a workspace, got none");
}
