// cast_layouts, and quantize and dequantize of tiles, of the CUDA backend, run on the host: the
// bits of the CPU backend.
#include <cmath>

#include "simt/layouts.h"

using namespace quaver;
using namespace quaver::test;

namespace {

constexpr Grain kGrains[] = {Grain::row, Grain::block, Grain::tile};

void check(const Shape& shape, DType from, DType to, Grain grain, bool power_of_two,
           float odd = 1.0f, int64_t skew = 0, int which = 3, bool tiles_t = false) {
  const int64_t n = shape.rows * shape.cols;
  Buffer x(n * size_of(from), skew * size_of(from));
  fill(&x, from, n, 23);
  if (from == DType::f32 && n > 0) x.as<float>()[n / 2] = odd;
  const TensorView values = view(x, from, shape.rows, shape.cols);
  LayoutsCast cast;
  cast.grain = grain;
  cast.power_of_two = power_of_two;
  cast.tiles_t = tiles_t;
  OperandMemory q(shape.rows, shape.cols, cast.layout(), to, skew);
  OperandMemory qt(shape.cols, shape.rows, cast.layout_t(), to, skew);
  if (which & 1) cast.q = q.operand(q.wanted, q.wanted_scale);
  if (which & 2) cast.qt = qt.operand(qt.wanted, qt.wanted_scale);
  cpu::cast_layouts(cast, values);
  if (which & 1) cast.q = q.operand(q.got, q.got_scale);
  if (which & 2) cast.qt = qt.operand(qt.got, qt.got_scale);
  cuda::cast_layouts(cast, values, nullptr);
  if (which & 1) q.check();
  if (which & 2) qt.check();
}

void check_tiles(const Shape& shape, DType from, DType to, bool given, bool stochastic) {
  const int64_t n = shape.rows * shape.cols;
  Buffer x(n * size_of(from)), wanted(n * size_of(to)), got(n * size_of(to), 0, 0x3b);
  fill(&x, from, n, 7);
  const TensorView values = view(x, from, shape.rows, shape.cols);
  QuantizeOptions o;
  o.layout = {Grain::tile, kScaleTile};
  o.stochastic = stochastic;
  o.seed = 91;
  const auto count = static_cast<size_t>(o.layout.scale_count(values));
  std::vector<float> scale(count, 0.37f), amax(count), cuda_scale = scale, cuda_amax(count);
  ScaleSource source;
  source.given = given;
  cpu::quantize(view(wanted, to, shape.rows, shape.cols), view(scale), view(amax), values, o,
                source);
  cuda::quantize(view(got, to, shape.rows, shape.cols), view(cuda_scale), view(cuda_amax), values,
                 o, source, nullptr);
  CHECK(wanted.bytes() == got.bytes() && got.guards_hold());
  CHECK(same_bits(scale, cuda_scale) && same_bits(amax, cuda_amax));
  Buffer decoded(n * size_of(from)), cuda_decoded(n * size_of(from), 0, 0x3b);
  cpu::dequantize(view(decoded, from, shape.rows, shape.cols),
                  view(wanted, to, shape.rows, shape.cols), view(scale), o.layout);
  cuda::dequantize(view(cuda_decoded, from, shape.rows, shape.cols),
                   view(wanted, to, shape.rows, shape.cols), view(scale), o.layout, nullptr);
  CHECK(decoded.bytes() == cuda_decoded.bytes());
}

}  // namespace

TEST(every_shape) {
  for (const Shape& shape : kShapes)
    for (const Grain grain : kGrains) check(shape, DType::bf16, DType::e4m3, grain, false);
}

TEST(around_a_tile) {
  for (const int64_t rows : {15, 127, 129, 256})
    for (const int64_t cols : {16, 127, 144})
      for (const Grain grain : kGrains) check({rows, cols}, DType::f32, DType::e4m3, grain, true);
}

TEST(every_type) {
  for (const DType from : {DType::f32, DType::f16, DType::bf16})
    for (const DType to : {DType::e4m3, DType::e5m2})
      for (const Grain grain : kGrains) check({144, 160}, from, to, grain, false);
}

TEST(one_layout) {
  for (const Grain grain : kGrains)
    for (const int which : {1, 2})
      check({144, 96}, DType::bf16, DType::e4m3, grain, false, 1, 0, which);
}

TEST(tiles_beside_blocks) {
  for (const Shape& shape : kShapes)
    check(shape, DType::bf16, DType::e4m3, Grain::block, true, 1, 0, 3, true);
  for (const float odd : {1e6f, INFINITY, NAN})
    for (const int which : {2, 3})
      check({144, 260}, DType::f32, DType::e5m2, Grain::block, false, odd, 1, which, true);
}

TEST(values_that_are_not_finite) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  for (const Grain grain : kGrains)
    for (const float odd : {infinity, -infinity, std::nanf("")})
      check({144, 160}, DType::f32, DType::e4m3, grain, false, odd);
}

TEST(views_that_are_not_aligned) {
  for (const Grain grain : kGrains) check({144, 160}, DType::bf16, DType::e4m3, grain, false, 1, 3);
}

TEST(orders) {
  in_every_order([] {
    for (const Grain grain : kGrains) check({200, 140}, DType::bf16, DType::e4m3, grain, false);
  });
}

TEST(tiles) {
  for (const Shape& shape : {Shape{1, 1}, Shape{130, 144}, Shape{144, 257}})
    for (const bool given : {false, true})
      for (const bool stochastic : {false, true})
        check_tiles(shape, DType::bf16, DType::e4m3, given, stochastic);
  for (const DType from : {DType::f32, DType::f16})
    for (const DType to : {DType::e5m2, DType::f16}) check_tiles({130, 144}, from, to, false, true);
}

TEST(wrong_arguments_are_named) {
  Buffer x(64), q(256);
  std::vector<float> scale(16);
  LayoutsCast cast;
  cast.q = {view(q, DType::e4m3, 16, 16), view(scale)};
  CHECK_THROWS(cuda::cast_layouts(cast, view(x, DType::f32, 2, 20), nullptr),
               "q of [2, 20] must be [16, 32], got [16, 16]");
  cast.tiles_t = true;
  cast.grain = Grain::row;
  CHECK_THROWS(cuda::cast_layouts(cast, view(x, DType::f32, 2, 8), nullptr),
               "tiles_t goes with granularity block alone");
  cast.tiles_t = false;
  cast.grain = Grain::block;
  cast.q.scale = view(x, DType::f32, 1, 2);
  CHECK_THROWS(cuda::cast_layouts(cast, view(x, DType::f32, 2, 8), nullptr),
               "q wants 16 f32 scales, got 2");
}
