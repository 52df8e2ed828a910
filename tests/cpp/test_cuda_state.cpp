// encode_state and decode_state of the CUDA backend, run on the host: the bits of the CPU backend.
#include "quaver/optimizer.h"
#include "simt/cases.h"

using namespace quaver;
using namespace quaver::test;

namespace {

struct Copy {
  Buffer codes, scales, values;
  Copy(int64_t n, int64_t skew)
      : codes(n, skew), scales(group_count(n) * 4), values(n * 4, skew * 4) {}
  StateView state(DType type, int64_t n, Scaling scaling) {
    return {view(codes, type, 1, n), scales.as<float>(), nullptr, scaling};
  }
};

void check(int64_t n, DType from, DType to, Scaling scaling, int64_t skew = 0) {
  Buffer x(n * size_of(from), skew * size_of(from));
  fill(&x, from, n, 100 + n);
  Copy cpu(n, skew), cuda(n, skew);
  const TensorView values = view(x, from, 1, n);
  cpu::encode_state(cpu.state(to, n, scaling), values);
  cuda::encode_state(cuda.state(to, n, scaling), values, nullptr);
  CHECK(cpu.codes.bytes() == cuda.codes.bytes());
  CHECK(cpu.scales.bytes() == cuda.scales.bytes());
  cpu::decode_state(view(cpu.values, DType::f32, 1, n), cpu.state(to, n, scaling));
  cuda::decode_state(view(cuda.values, DType::f32, 1, n), cuda.state(to, n, scaling), nullptr);
  CHECK(cpu.values.bytes() == cuda.values.bytes());
  CHECK(cuda.codes.guards_hold() && cuda.scales.guards_hold() && cuda.values.guards_hold());
}

}  // namespace

TEST(every_format_and_size) {
  for (const Scaling scaling : {Scaling::group, Scaling::expand})
    for (const DType to : {DType::e4m3, DType::e5m2})
      for (const DType from : {DType::f32, DType::f16, DType::bf16})
        for (const int64_t n : {0, 1, 3, 127, 128, 129, 1000, 1024, 40000})
          check(n, from, to, scaling);
}

TEST(views_that_are_not_aligned) {
  for (const int64_t skew : {1, 8}) check(1000, DType::f32, DType::e4m3, Scaling::expand, skew);
}

// Whole groups of what has no scale to speak of.
TEST(awkward_groups) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const float special : {0.0f, -0.0f, 1e-45f, 3e-39f, 1.2e-38f, 3.4e38f, infinity, nan}) {
    for (const int64_t count : {1, 2, 128}) {  // of which so many are special
      Buffer x(130 * 4);
      fill(&x, DType::f32, 130, 3);
      for (int64_t i = 0; i < count; ++i) x.as<float>()[i] = i % 2 ? special : -special;
      Copy cpu(130, 0), cuda(130, 0);
      for (const Scaling scaling : {Scaling::group, Scaling::expand}) {
        cpu::encode_state(cpu.state(DType::e4m3, 130, scaling), view(x, DType::f32, 1, 130));
        cuda::encode_state(cuda.state(DType::e4m3, 130, scaling), view(x, DType::f32, 1, 130),
                           nullptr);
        CHECK(cpu.codes.bytes() == cuda.codes.bytes());
        CHECK(cpu.scales.bytes() == cuda.scales.bytes());
      }
    }
  }
}

TEST(wrong_arguments_are_named) {
  Copy c(8, 0);
  Buffer x(8 * 4);
  CHECK_THROWS(cuda::encode_state(c.state(DType::f16, 8, Scaling::group), view(x, DType::f32, 1, 8),
                                  nullptr),
               "must be e4m3 or e5m2, got f16");
  CHECK_THROWS(cuda::decode_state(view(x, DType::f32, 1, 7),
                                  c.state(DType::e4m3, 8, Scaling::group), nullptr),
               "out must be 8 f32, got 7 f32");
}
