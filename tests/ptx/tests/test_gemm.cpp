// The matrix products that ship, run on the interpreter of PTX and compared with f64: every tactic,
// in situations that a GPU gives by chance only.
#include <algorithm>

#include "../runtime/runtime.h"
#include "gemm_product.h"
#include "gemm_tactics.h"
#include "test.h"

using namespace quaver;

namespace quaver::cuda::gemm_sm90 {

#define QUAVER_ROW(NAME, ...) void run_##NAME(const GemmArguments&, const GemmLaunch&);
QUAVER_GEMM_TACTICS(QUAVER_ROW)
#undef QUAVER_ROW

constexpr void (*kRun[])(const GemmArguments&, const GemmLaunch&) = {
#define QUAVER_ROW(NAME, ...) run_##NAME,
    QUAVER_GEMM_TACTICS(QUAVER_ROW)
#undef QUAVER_ROW
};

}  // namespace quaver::cuda::gemm_sm90

namespace {

using test::Product;
using Shape = test::ProductShape;

// What a launch may meet. The order of warps is the machine's free choice, as is when copies land
// and products are computed between their start and the wait for them.
struct Situation {
  const char* name;
  Shape shape;
  ptx::LaunchOptions options = {};
  bool rows = false, second = false, accumulate = false;
};

Product product(const GemmTactic& t, const Situation& s) {
  ptx::launch_options = s.options;
  return Product(t, {s.name, s.shape, s.rows, s.second, s.accumulate, s.options.timing.cut_sums});
}

void run(Product* p) { p->run(cuda::gemm_sm90::kRun[p->candidate().index]); }

// Calls f for every tactic of Hopper; an error tells its name.
template <class F>
void for_each_tactic(F f) {
  for (const GemmTactic& t : gemm_tactics()) try {
      if (t.schedule != GemmSchedule::warps) f(t);
    } catch (const Error& error) {
      fail(t.name, ": ", error.what());
    }
}

void check_all(const Situation& s) {
  for_each_tactic([&](const GemmTactic& t) {
    Product p = product(t, s);
    run(&p);
    CHECK_EQ(p.check(), 0);
  });
}

// More tiles than multiprocessors, and rests on every side.
constexpr Shape kLarge = {300, 272, 912, 6}, kSmall = {145, 400, 144, 4}, kLeast = {1, 16, 16, 2};

ptx::Timing late() {
  ptx::Timing t;
  t.late_loads = t.late_stores = t.late_products = true;
  return t;
}

void shuffle(std::vector<int>* warps) {
  static test::Generator g(3);
  std::shuffle(warps->begin(), warps->end(), g);
}

}  // namespace

TEST(ragged_shapes) {
  check_all({"as they come", kLarge});
  check_all({"scales of rows, the second format", kSmall, {}, true, true});
  check_all({"one row", kLeast});
}

TEST(accumulation) {
  check_all({"bf16", kLarge, {}, false, false, true});
  check_all({"f16", kSmall, {}, true, true, true});
}

TEST(stream_k_cuts_k_in_both_ways) {
  for (const Shape& shape : {Shape{300, 272, 912, 6}, Shape{64, 48, 2064, 4}})
    for_each_tactic([&](const GemmTactic& t) {
      if (t.scheduler != GemmScheduler::stream_k) return;
      Product p = product(t, {"", shape, {}, false, false, true});
      CHECK_EQ(p.launch().splits > 1, shape.k > 2048);
      run(&p);
      CHECK_EQ(p.check(), 0);
    });
}

TEST(copies_and_products_as_late_as_they_may_be) {
  ptx::LaunchOptions options;
  options.timing = late();
  check_all({"late", kLarge, options, false, false, true});
  options.timing.descending = true;
  options.turn = 61;
  options.shuffle = shuffle;
  check_all({"late, in another order", kSmall, options, false, false, true});
}

TEST(each_kind_of_work_late_alone) {
  for (bool ptx::Timing::* kind :
       {&ptx::Timing::late_loads, &ptx::Timing::late_stores, &ptx::Timing::late_products}) {
    ptx::LaunchOptions options;
    options.timing.*kind = true;
    check_all({"one late", kSmall, options});
  }
}

TEST(a_cta_of_a_cluster_that_is_late) {
  for (int rank : {0, 1}) {
    ptx::LaunchOptions options;
    options.timing.late_cta = rank;
    options.shuffle = shuffle;
    check_all({"a late CTA", kSmall, options});
  }
}

TEST(fewer_clusters_at_a_time_than_the_grid_has) {
  ptx::LaunchOptions options;
  options.resident = 1;
  check_all({"one cluster", kLarge, options});
  CHECK(ptx::launch_options.clusters > 1);
}

// Both tolerances of reference/gemm.py, against sums as the tensor core makes them: that of f32
// alone does not hold for fast sums.
TEST(sums_cut_as_by_the_tensor_core_keep_their_tolerance) {
  for_each_tactic([](const GemmTactic& t) {
    ptx::LaunchOptions options;
    options.timing.cut_sums = true;
    Product p = product(t, {"cut", kLarge, options});
    run(&p);
    const int64_t beyond = p.check();
    CHECK(t.out != GemmOut::f32 || !t.fast || beyond > 0);
  });
}
