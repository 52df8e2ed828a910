// The matrix products of mma.sync, of the CUDA backend, run on the host and, as test_cuda_gemm_ptx,
// on the interpreter of PTX: compared with f64.
#include <limits>

#include "gemm_product.h"
#include "simt/cases.h"

using namespace quaver;
using namespace quaver::test;

namespace {

// Rests on every side of both tiles, more than one tile and band, and less than one.
constexpr ProductShape kLarge = {300, 272, 464, 6}, kSmall = {145, 80, 144, 4},
                       kLeast = {1, 16, 16, 2};

// On the host a thread switches at each exchange of a warp, which takes long.
ProductShape large() { return simt::interpreter ? kLarge : kSmall; }

void multiply(Product* p) {
  p->run([&](const GemmArguments& arguments, const GemmLaunch& launch) {
    cuda::gemm_mma(arguments, p->candidate().index - hopper_tactics(), launch);
  });
}

// Calls f for every tactic of mma.sync; an error tells its name.
template <class F>
void for_each_tactic(F f) {
  for (const GemmTactic& t : gemm_tactics()) try {
      if (t.schedule == GemmSchedule::warps) f(t);
    } catch (const std::exception& error) {
      fail(t.name, ": ", error.what());
    }
}

bool of_bytes(const GemmTactic& t) { return t.copies == GemmCopies::bytes; }

// Makes a case one that the tactic serves: copies of bytes are for what is not aligned alone.
ProductCase served(const GemmTactic& t, ProductCase c) {
  c.hopper = false;
  if (of_bytes(t)) {
    c.shape.n -= 3;
    c.shape.k -= 5;
  }
  return c;
}

void check_all(const ProductCase& c) {
  simt::control.cut_sums = c.cut;
  for_each_tactic([&](const GemmTactic& t) {
    Product p(t, served(t, c));
    multiply(&p);
    CHECK_EQ(p.check(), 0);
  });
}

// A tactic by its name.
const GemmTactic& named(const std::string& name) {
  for (const GemmTactic& t : gemm_tactics())
    if (t.name == name) return t;
  fail("no tactic ", name);
}

}  // namespace

TEST(ragged_shapes) {
  check_all({"as they come", large()});
  check_all({"one row", kLeast});
}

TEST(scales_of_rows_and_the_second_format) { check_all({"rows", kSmall, true, true}); }

TEST(accumulation) {
  check_all({"bf16", kSmall, false, false, true});
  check_all({"f16", kLeast, true, true, true});
}

TEST(every_order_of_blocks_and_warps) {
  in_every_order([] {
    for (const char* name : {"mma_e4m3_e4m3_half_128x128", "mma_e5m2_e4m3_f32_64x64"}) {
      Product p(named(name), served(named(name), {"", kSmall, true}));
      multiply(&p);
      CHECK_EQ(p.check(), 0);
    }
  });
}

TEST(operands_anywhere_and_of_any_width) {
  for_each_tactic([](const GemmTactic& t) {
    if (!of_bytes(t)) return;
    for (const ProductShape& shape : {ProductShape{70, 67, 131, 2}, {3, 1, 1, 2}, {5, 8, 64, 2}})
      for (const bool hopper : {false, true}) {
        ProductCase c = {"", shape};
        c.hopper = hopper;
        c.skew = 1;
        Product p(t, c);
        multiply(&p);
        CHECK_EQ(p.check(), 0);
      }
  });
}

// Both tolerances of reference/gemm.py, against sums as the tensor core makes them: that of f32
// alone does not hold for fast sums.
TEST(sums_cut_as_by_the_tensor_core_keep_their_tolerance) {
  if (!simt::interpreter) return;  // the host's sums are exact
  simt::control.cut_sums = true;
  for_each_tactic([](const GemmTactic& t) {
    ProductCase c = served(t, {"cut", {70, 80, 912, 4}});
    c.cut = true;
    Product p(t, c);
    multiply(&p);
    const int64_t beyond = p.check();
    CHECK(t.out != GemmOut::f32 || !t.fast || beyond > 0);
  });
  simt::control.cut_sums = false;
}

// A scale that is NaN reaches all it scales, and the amax.
TEST(a_scale_that_is_no_number) {
  for_each_tactic([](const GemmTactic& t) {
    Product p(t, served(t, {"", kSmall, true}));
    std::vector<float> scales(kSmall.m, 1.0f);
    scales[7] = std::numeric_limits<float>::quiet_NaN();
    p.arguments().scale_a = scales.data();
    multiply(&p);
    const int64_t n = p.arguments().out.cols, size = size_of(p.arguments().out.dtype);
    for (const int64_t row : {6, 7, 8})
      for (int64_t col = 0; col < n; ++col) {
        const double x =
            decode_from(p.result().codes() + (row * n + col) * size, p.arguments().out.dtype);
        CHECK_EQ(x != x, row == 7);
      }
    if (t.out == GemmOut::fp8) CHECK(*p.arguments().amax != *p.arguments().amax);
  });
}

TEST(what_the_kernels_refuse) {
  const GemmTactic& t = named("mma_e4m3_e4m3_half_64x64");
  Product p(t, served(t, {"", kLeast}));
  p.arguments().a.dtype = p.arguments().b.dtype = DType::e5m2;
  CHECK_THROWS(multiply(&p), "e5m2 x e5m2 has no CUDA kernel");
}
