// quantize and dequantize of the CUDA backend, run on the host: the bits of the CPU backend.
#include "quaver/quantize.h"
#include "simt/cast_workspace.h"

using namespace quaver;
using namespace quaver::test;

namespace {

struct Case {
  Shape shape;
  DType from = DType::f32, to = DType::e4m3;
  QuantizeOptions options;
  bool given = false;
  int64_t skew = 0;  // of x and q, in elements
  float bad = 0.0f;  // placed in the middle where it is not zero
};

std::string describe(const Case& c, const char* what) {
  std::ostringstream text;
  text << what << " of [" << c.shape.rows << ", " << c.shape.cols << "] " << name_of(c.from)
       << " to " << name_of(c.to) << ", grain " << int(c.options.layout.grain) << ", block "
       << c.options.layout.block << ", power_of_two " << c.options.power_of_two << ", stochastic "
       << c.options.stochastic << ", given " << c.given << ", skew " << c.skew;
  return text.str();
}

void check(const Case& c) {
  const int64_t n = c.shape.rows * c.shape.cols;
  Buffer x(n * size_of(c.from), c.skew * size_of(c.from));
  fill(&x, c.from, n, 17);
  if (c.bad != 0.0f && c.from == DType::f32) x.as<float>()[n / 2] = c.bad;
  Buffer wanted(n * size_of(c.to)), got(n * size_of(c.to), c.skew * size_of(c.to), 0x3b);
  const TensorView from = view(x, c.from, c.shape.rows, c.shape.cols);
  const TensorView cpu_q = view(wanted, c.to, c.shape.rows, c.shape.cols);
  const TensorView cuda_q = view(got, c.to, c.shape.rows, c.shape.cols);
  std::vector<float> scale(c.options.layout.scale_count(from), 0.37f), amax(scale.size(), -1.0f);
  std::vector<float> cuda_scale = scale, cuda_amax = amax;
  ScaleSource source;
  source.given = c.given;
  CastWorkspace memory(c.shape.rows, c.shape.cols);
  cpu::quantize(cpu_q, view(scale), view(amax), from, c.options, source);
  cuda::quantize(cuda_q, view(cuda_scale), view(cuda_amax), from, c.options, memory.with(source),
                 nullptr);
  CHECK_EQ(describe(c, wanted.bytes() == got.bytes() ? "" : "codes"), describe(c, ""));
  CHECK_EQ(describe(c, same_bits(scale, cuda_scale) ? "" : "scales"), describe(c, ""));
  CHECK_EQ(describe(c, same_bits(amax, cuda_amax) ? "" : "amaxes"), describe(c, ""));
  CHECK(got.guards_hold() && memory.guards_hold());
}

const DType kFloats[] = {DType::f32, DType::f16, DType::bf16};
const DType kCodes[] = {DType::e4m3, DType::e5m2, DType::f16};

QuantizeOptions options(Grain grain, int64_t block, bool power_of_two, bool stochastic) {
  QuantizeOptions o;
  o.layout.grain = grain;
  o.layout.block = block;
  o.power_of_two = power_of_two;
  o.stochastic = stochastic;
  o.seed = 5;
  return o;
}

}  // namespace

TEST(every_shape_and_grain) {
  for (const Shape& shape : kShapes)
    for (const bool stochastic : {false, true}) {
      check({shape, DType::f32, DType::e4m3, options(Grain::tensor, 0, false, stochastic)});
      check({shape, DType::bf16, DType::e4m3, options(Grain::row, 0, true, stochastic)});
      for (const int64_t block : {1, 16, 100, 128, 1000})
        check({shape, DType::bf16, DType::e5m2, options(Grain::block, block, true, stochastic)});
    }
}

TEST(every_type) {
  for (const DType from : kFloats)
    for (const DType to : kCodes)
      for (const bool power_of_two : {false, true})
        for (const bool stochastic : {false, true})
          for (const auto grain : {Grain::tensor, Grain::row, Grain::block})
            check({{5, 144}, from, to, options(grain, 48, power_of_two, stochastic)});
}

TEST(given_scales) {
  for (const auto grain : {Grain::tensor, Grain::row, Grain::block}) {
    Case c{{9, 80}, DType::f16, DType::e4m3, options(grain, 32, true, false)};
    c.given = true;
    check(c);
  }
}

TEST(views_that_are_not_aligned) {
  for (const int64_t skew : {1, 3, 8})
    for (const DType from : kFloats)
      for (const auto grain : {Grain::tensor, Grain::row}) {
        Case c{{3, 96}, from, DType::e4m3, options(grain, 0, true, false)};
        c.skew = skew;
        check(c);
      }
}

TEST(values_that_are_not_finite) {
  for (const float bad :
       {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
        std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::quiet_NaN()})
    for (const DType to : kCodes)
      for (const auto grain : {Grain::tensor, Grain::row}) {
        Case c{{3, 37}, DType::f32, to, options(grain, 0, true, false)};
        c.bad = bad;
        check(c);
      }
}

TEST(orders) {
  in_every_order([] {
    for (const bool stochastic : {false, true}) {
      check({{40, 1000}, DType::bf16, DType::e4m3, options(Grain::tensor, 0, false, stochastic)});
      check({{5, 1000}, DType::f32, DType::e5m2, options(Grain::row, 0, false, stochastic)});
      check({{3, 1000}, DType::f32, DType::e5m2, options(Grain::block, 128, false, stochastic)});
    }
  });
}

// Warming up, then delayed, then a value that is not finite, then warming up again.
TEST(delayed_scaling) {
  in_every_order([] {
    constexpr int64_t n = 9000;
    Buffer x(4 * n), wanted(n), got(n);
    CastWorkspace memory(1, n);
    std::vector<float> history(kHistoryState, 0.0f), cuda_history = history;
    for (int step = 0; step < 3 * kHistory; ++step) {
      fill(&x, DType::f32, n, 100 + step);
      if (step == 18 || step == 22)  // a forecast that is far off, both ways
        for (auto* h : {&history, &cuda_history}) rescale(h, step == 18 ? 1e4f : 1e-5f);
      if (step == 2 * kHistory) x.as<float>()[77] = std::numeric_limits<float>::infinity();
      std::vector<float> scale(1, -1.0f), amax(1, -1.0f), cuda_scale(1, -2.0f), cuda_amax(1, -2.0f);
      const TensorView from = view(x, DType::f32, 1, n);
      cpu::quantize(view(wanted, DType::e4m3, 1, n), view(scale), view(amax), from, {},
                    {false, history.data()});
      cuda::quantize(view(got, DType::e4m3, 1, n), view(cuda_scale), view(cuda_amax), from, {},
                     memory.with({false, cuda_history.data()}), nullptr);
      CHECK(wanted.bytes() == got.bytes());
      CHECK(same_bits(scale, cuda_scale) && same_bits(amax, cuda_amax));
      CHECK(same_bits(history, cuda_history));
    }
  });
}

TEST(dequantize) {
  for (const DType from : {DType::e4m3, DType::e5m2, DType::f16, DType::bf16, DType::f32})
    for (const DType to : kFloats)
      for (const Shape& shape : kShapes)
        for (const int64_t skew : {0, 3})
          for (const QuantizeOptions& o :
               {options(Grain::tensor, 0, true, false), options(Grain::row, 0, true, false),
                options(Grain::block, 32, true, false)}) {
            if (to != DType::bf16 && skew != 0) continue;
            const int64_t n = shape.rows * shape.cols;
            Buffer q(n * size_of(from), skew * size_of(from));
            fill(&q, from, n, 3);
            Buffer wanted(n * size_of(to)), got(n * size_of(to), skew * size_of(to), 0x3b);
            const TensorView codes = view(q, from, shape.rows, shape.cols);
            std::vector<float> scale(o.layout.scale_count(codes));
            for (size_t i = 0; i < scale.size(); ++i) scale[i] = 0.01f * float(i + 1);
            cpu::dequantize(view(wanted, to, shape.rows, shape.cols), codes, view(scale), o.layout);
            cuda::dequantize(view(got, to, shape.rows, shape.cols), codes, view(scale), o.layout,
                             nullptr);
            CHECK(wanted.bytes() == got.bytes());
            CHECK(got.guards_hold());
          }
}

TEST(wrong_arguments_are_named) {
  Buffer x(64), q(64);
  std::vector<float> scale(1), amax(1), two(2);
  const TensorView from = view(x, DType::f32, 2, 8), to = view(q, DType::e4m3, 2, 8);
  CHECK_THROWS(
      cuda::quantize(view(q, DType::bf16, 2, 8), view(scale), view(amax), from, {}, {}, nullptr),
      "dtype must be e4m3, e5m2 or f16, got bf16");
  CHECK_THROWS(
      cuda::quantize(view(q, DType::e4m3, 1, 8), view(scale), view(amax), from, {}, {}, nullptr),
      "q must have x's shape [2, 8], got [1, 8]");
  CHECK_THROWS(cuda::quantize(to, view(two), view(two), from, {}, {}, nullptr),
               "wanted 1 scales, got 2");
  CHECK_THROWS(cuda::quantize(to, view(scale), view(amax), from,
                              options(Grain::block, 0, true, false), {}, nullptr),
               "block must be positive, got 0");
}
