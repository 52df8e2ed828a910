// nf4_encode and nf4_decode of the CUDA backend, run on the host: the bits of the CPU backend.
#include "quaver/nf4.h"
#include "simt/cases.h"

using namespace quaver;
using namespace quaver::test;

namespace {

struct Copy {
  Buffer codes, absmax, values;
  Copy(int64_t n, int64_t block, DType to, int64_t skew)
      : codes((n + 1) / 2, skew),
        absmax(nf4_block_count(n, block) * 4),
        values(n * size_of(to), skew * size_of(to)) {}
  Nf4View view_of(int64_t n, int64_t block) { return {codes.data(), absmax.as<float>(), n, block}; }
};

void check(int64_t n, DType type, int64_t block, int64_t skew = 0, float special = 1.0f) {
  Buffer x(n * size_of(type), skew * size_of(type));
  fill(&x, type, n, 100 + n);
  if (type == DType::f32 && n > 70) x.as<float>()[70] = special;
  Copy cpu(n, block, type, skew), cuda(n, block, type, skew);
  cpu::nf4_encode(cpu.view_of(n, block), view(x, type, 1, n));
  cuda::nf4_encode(cuda.view_of(n, block), view(x, type, 1, n), nullptr);
  CHECK(cpu.codes.bytes() == cuda.codes.bytes());
  CHECK(cpu.absmax.bytes() == cuda.absmax.bytes());
  cpu::nf4_decode(view(cpu.values, type, 1, n), cpu.view_of(n, block));
  cuda::nf4_decode(view(cuda.values, type, 1, n), cuda.view_of(n, block), nullptr);
  CHECK(same_values(cpu.values, cuda.values, type));
  CHECK(cuda.codes.guards_hold() && cuda.absmax.guards_hold() && cuda.values.guards_hold());
  CHECK(cpu.codes.guards_hold() && cpu.absmax.guards_hold() && cpu.values.guards_hold());
}

}  // namespace

TEST(every_type_size_and_block) {
  for (const int64_t block : {64, 128, 1024, 4096})
    for (const DType type : {DType::f32, DType::f16, DType::bf16})
      for (const int64_t n : {0, 1, 3, 16, 63, 64, 65, 1000, 4095, 4096, 4097, 40001})
        in_every_order([&] { check(n, type, block); });
}

TEST(views_that_are_not_aligned) {
  for (const int64_t skew : {1, 8}) check(1000, DType::bf16, 64, skew);
}

TEST(awkward_values) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const float special : {0.0f, -0.0f, 1e-45f, 3e-39f, 3.4e38f, infinity, -infinity, nan, -nan})
    check(130, DType::f32, 64, 0, special);
}

// A value between two levels takes the nearer one, and the lower one of two as near.
TEST(levels_are_their_own_codes_and_midpoints_go_down) {
  for (uint32_t k = 0; k < kNf4Levels; ++k) {
    CHECK(nf4_code(nf4_level(k)) == k);
    if (k + 1 == kNf4Levels) continue;
    const float middle = (nf4_level(k) + nf4_level(k + 1)) / 2.0f;
    CHECK(nf4_code(middle) == k);
    CHECK(nf4_code(std::nextafter(middle, 2.0f)) == k + 1);
  }
  CHECK(nf4_level(kNf4Zero) == 0.0f);
}

TEST(wrong_arguments_are_named) {
  Copy c(8, 64, DType::f32, 0);
  Buffer x(8 * 4);
  CHECK_THROWS(cuda::nf4_encode(c.view_of(8, 96), view(x, DType::f32, 1, 8), nullptr),
               "nf4_encode: block must be a power of two from 64 to 4096, got 96");
  CHECK_THROWS(cuda::nf4_decode(view(x, DType::f32, 1, 7), c.view_of(8, 64), nullptr),
               "nf4_decode: out must have 8 values, got 7");
  CHECK_THROWS(cpu::nf4_encode(c.view_of(8, 64), view(x, DType::e4m3, 1, 8)),
               "nf4_encode: x must be f32, f16 or bf16, got e4m3");
}
