// The table of tactics, the choice among them and the argument checks of gemm: no GPU is needed.
#include <algorithm>
#include <set>
#include <string>

#include "arguments.h"
#include "quaver/gemm_choice.h"
#include "test.h"

namespace quaver {
namespace {

const DType kOuts[] = {DType::bf16, DType::f16, DType::f32, DType::e4m3, DType::e5m2};
const std::pair<DType, DType> kPairs[] = {
    {DType::e4m3, DType::e4m3}, {DType::e5m2, DType::e4m3}, {DType::e4m3, DType::e5m2}};

const GemmScales kScales[] = {GemmScales::outer, GemmScales::tiles, GemmScales::blocks};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What the kernels promise to serve: any pair but e5m2 x e5m2; FP8 out where `a` and `b` are what
// layers multiply; adding to what is not FP8; scales of blocks of e4m3, on Hopper.
bool promised(const GemmProblem& p) {
  if (p.scales != GemmScales::outer && (!p.hopper || !p.aligned)) return false;
  if (p.scales != GemmScales::outer)
    return p.a == DType::e4m3 && p.b == DType::e4m3 && !is_fp8(p.out);
  if (is_fp8(p.out)) return !p.accumulate && p.b == DType::e4m3;
  return true;
}

// Machines: Hopper; another GPU; either with pointers or widths that are no multiples of 16.
struct Machine {
  bool hopper, aligned;
};
constexpr Machine kHopper = {true, true};
constexpr Machine kMachines[] = {kHopper, {false, true}, {true, false}, {false, false}};

bool uses_mma(const GemmProblem& p) { return !p.hopper || !p.aligned; }

template <class Body>
void for_each_problem(Body body, const Machine& machine = kHopper) {
  const int64_t sizes[] = {16, 48, 128, 144, 1008, 4096, 4112, 28672, 151936};
  for (int64_t m : {int64_t(1), int64_t(17), int64_t(64), int64_t(4096), int64_t(100000)})
    for (int64_t n : sizes)
      for (int64_t k : sizes)
        for (const auto& [a, b] : kPairs)
          for (DType out : kOuts)
            for (GemmScales scales : kScales)
              for (int flags = 0; flags < 4; ++flags) {
                const GemmProblem p{m,
                                    n,
                                    k,
                                    a,
                                    b,
                                    out,
                                    (flags & 1) != 0,
                                    (flags & 2) != 0,
                                    scales,
                                    machine.hopper,
                                    machine.aligned};
                if (promised(p)) body(p);
              }
}

TEST(every_row_says_what_its_name_says) {
  std::set<std::string> names;
  for (const GemmTactic& t : gemm_tactics()) {
    const bool warps = t.schedule == GemmSchedule::warps;
    CHECK_EQ(warps, t.copies != GemmCopies::tma);
    std::string wanted = std::string(warps ? "mma_" : "") + name_of(t.a) + "_" + name_of(t.b);
    if (t.fast) wanted += "_fast";
    if (t.scales != GemmScales::outer)
      wanted += t.scales == GemmScales::tiles ? "_tiles" : "_blocks";
    wanted += t.out == GemmOut::half ? "_half" : t.out == GemmOut::f32 ? "_f32" : "_fp8";
    wanted += "_" + std::to_string(t.tile_m) + "x" + std::to_string(t.tile_n);
    if (t.scheduler == GemmScheduler::stream_k) wanted += "_stream_k";
    if (t.copies == GemmCopies::bytes) wanted += "_bytes";
    CHECK_EQ(std::string(t.name), wanted);
    CHECK(names.insert(t.name).second);
  }
}

// Each of these spills, or is refused by CUTLASS.
TEST(no_row_asks_for_what_does_not_compile_well) {
  for (const GemmTactic& t : gemm_tactics()) {
    CHECK(t.schedule != GemmSchedule::warps || t.copies != GemmCopies::bytes || t.tile_m == 64);
    CHECK(t.schedule != GemmSchedule::warps || t.tile_m * t.tile_n <= 128 * 128);
    CHECK(t.fast || !t.source || t.tile_m * t.tile_n <= 128 * 128);
    CHECK(t.schedule != GemmSchedule::pingpong || t.tile_m * t.tile_n <= 128 * 128);
    CHECK(t.schedule != GemmSchedule::pingpong || t.scheduler == GemmScheduler::persistent);
    CHECK(t.schedule != GemmSchedule::cooperative || t.tile_m >= 128);
    CHECK(t.out != GemmOut::fp8 || !t.source);
    CHECK(t.a == DType::e4m3 || t.b == DType::e4m3);
    CHECK(t.scales == GemmScales::outer ||
          (!t.fast && t.schedule == GemmSchedule::cooperative && t.tile_n == 128));
  }
}

TEST(every_promised_problem_has_a_choice) {
  for (const Machine& machine : kMachines)
    for (int sm_count : {2, 78, 114, 132, 143})
      for_each_problem(
          [&](const GemmProblem& p) {
            const GemmCandidate c = choose_gemm(p, sm_count);
            CHECK(c.index >= 0 && c.tactic == &gemm_tactics()[c.index]);
            CHECK(c.tactic->a == p.a && c.tactic->b == p.b && c.tactic->scales == p.scales);
            CHECK(p.fast_accumulate || !c.tactic->fast);
            CHECK(c.tactic->source || !p.accumulate);
            CHECK(c.efficiency > 0.0 && c.efficiency <= 1.0);
            CHECK(c.launch.splits >= 1 && c.launch.splits <= 16);
            CHECK_EQ(c.tactic->schedule == GemmSchedule::warps, uses_mma(p));
            CHECK_EQ(c.tactic->copies == GemmCopies::bytes, !p.aligned);
          },
          machine);
}

TEST(candidates_come_best_first_and_are_explained) {
  for_each_problem([&](const GemmProblem& p) {
    const auto found = gemm_candidates(p, 132);
    for (size_t i = 1; i < found.size(); ++i) CHECK(found[i - 1].efficiency >= found[i].efficiency);
    const std::string why = explain_gemm(p, found);
    CHECK(why.find("tiles of") != std::string::npos);
    if (p.scales != GemmScales::outer) CHECK(why.find("as the scales lie") != std::string::npos);
    if (p.fast_accumulate || p.scales != GemmScales::outer) return;
    CHECK(why.find("as asked") != std::string::npos);
  });
}

// Every element of the output lies in exactly one tile, and the padding of the grid of tiles to
// whole clusters and bands is less than one band on either axis, so no wave is spent on it alone.
TEST(tiles_cover_the_output_once) {
  for_each_problem([&](const GemmProblem& p) {
    for (const GemmCandidate& c : gemm_candidates(p, 132)) {
      const GemmTactic& t = *c.tactic;
      const int64_t band_m = int64_t(t.cluster_m) * c.launch.swizzle;
      const int64_t band_n = int64_t(t.cluster_n) * c.launch.swizzle;
      const int64_t rows = ceil_div(ceil_div(p.m, t.tile_m), band_m) * band_m;
      const int64_t cols = ceil_div(ceil_div(p.n, t.tile_n), band_n) * band_n;
      CHECK_EQ(c.tiles, rows * cols);
      CHECK(rows * t.tile_m >= p.m && (rows - band_m) * t.tile_m < p.m);
      CHECK(cols * t.tile_n >= p.n && (cols - band_n) * t.tile_n < p.n);
      CHECK(c.tiles < int64_t(1) << 31);
      const int64_t slots = 132 / (t.cluster_m * t.cluster_n) * (t.cluster_m * t.cluster_n);
      const int64_t least = ceil_div(ceil_div(p.m, t.tile_m), t.cluster_m) * t.cluster_m *
                            (ceil_div(ceil_div(p.n, t.tile_n), t.cluster_n) * t.cluster_n);
      CHECK_EQ(ceil_div(c.tiles, slots), ceil_div(least, slots));
    }
  });
}

// More problems than a thread remembers, each asked twice, and for a second machine between.
TEST(tiles_of_warps_cover_the_output_once_and_are_explained) {
  for_each_problem(
      [&](const GemmProblem& p) {
        const auto found = gemm_candidates(p, 1);
        for (const GemmCandidate& c : found) {
          CHECK_EQ(c.tiles, ceil_div(p.m, c.tactic->tile_m) * ceil_div(p.n, c.tactic->tile_n));
          CHECK_EQ(c.workspace_bytes, 0);
          CHECK(c.launch.swizzle > 0 && c.launch.splits == 1);
        }
        CHECK(explain_gemm(p, found).find("by mma.sync") != std::string::npos);
      },
      kMachines[1]);
}

TEST(a_remembered_choice_is_the_first_candidate) {
  for_each_problem([&](const GemmProblem& p) {
    for (const int sm_count : {132, 78, 132}) {
      const GemmCandidate wanted = gemm_candidates(p, sm_count).front();
      for (int i = 0; i < 2; ++i) {
        const GemmCandidate c = choose_gemm(p, sm_count);
        CHECK_EQ(c.index, wanted.index);
        CHECK_EQ(c.workspace_bytes, wanted.workspace_bytes);
        CHECK_EQ(c.launch.sm_count, wanted.launch.sm_count);
        CHECK_EQ(c.launch.swizzle, wanted.launch.swizzle);
        CHECK_EQ(c.launch.splits, wanted.launch.splits);
      }
    }
  });
}

TEST(only_work_that_is_cut_needs_a_workspace) {
  for_each_problem([&](const GemmProblem& p) {
    for (const GemmCandidate& c : gemm_candidates(p, 132)) {
      const GemmTactic& t = *c.tactic;
      if (t.scheduler == GemmScheduler::persistent) {
        CHECK_EQ(c.workspace_bytes, 0);
        CHECK_EQ(c.launch.splits, 1);
        continue;
      }
      const int64_t tile = int64_t(t.tile_m) * t.tile_n * 4;
      const int64_t cut = c.launch.splits > 1 ? c.tiles : std::min<int64_t>(c.tiles, 2 * 132);
      CHECK(c.workspace_bytes >= cut * (tile + 8));
      CHECK(c.workspace_bytes < cut * (tile + 8) + 256);
      CHECK(c.workspace_bytes <= int64_t(48) << 20);
      if (c.launch.splits > 1) CHECK(c.tiles * c.launch.splits <= 132);
    }
  });
}

TEST(every_kernel_is_the_choice_for_some_problem) {
  std::set<std::string> chosen;
  for (const Machine& machine : kMachines)
    for_each_problem([&](const GemmProblem& p) { chosen.insert(choose_gemm(p, 132).tactic->name); },
                     machine);
  for (const GemmTactic& t : gemm_tactics())
    if (chosen.count(t.name) == 0) CHECK_EQ(std::string(t.name), "chosen by no problem");
}

TEST(a_few_choices) {
  const auto name = [](GemmProblem p) { return std::string(choose_gemm(p, 132).tactic->name); };
  GemmProblem p{8192, 8192, 8192};
  CHECK_EQ(name(p), std::string("e4m3_e4m3_fast_half_128x256"));
  p.m = 64;
  CHECK_EQ(name(p), std::string("e4m3_e4m3_fast_half_64x128"));
  GemmProblem wgrad{4096, 4096, 8192, DType::e5m2, DType::e4m3, DType::f32, true, false};
  CHECK_EQ(name(wgrad), std::string("e5m2_e4m3_f32_128x128"));
  wgrad.m = wgrad.n = 1024;  // 64 tiles would leave half of the multiprocessors idle
  CHECK_EQ(name(wgrad), std::string("e5m2_e4m3_f32_128x128_stream_k"));
  CHECK_EQ(choose_gemm(wgrad, 132).launch.splits, 2);
  wgrad.a = DType::e4m3;
  wgrad.scales = GemmScales::blocks;
  CHECK_EQ(name(wgrad), std::string("e4m3_e4m3_blocks_f32_128x128"));
  CHECK_EQ(name({4096, 4096, 4096, DType::e4m3, DType::e4m3, DType::bf16, false, true,
                 GemmScales::tiles}),
           std::string("e4m3_e4m3_tiles_half_128x128"));
}

TEST(a_few_choices_of_other_gpus) {
  const auto name = [](GemmProblem p, int sms) {
    return std::string(choose_gemm(p, sms).tactic->name);
  };
  GemmProblem p{4096, 4096, 4096};
  p.hopper = false;
  CHECK_EQ(name(p, 128), std::string("mma_e4m3_e4m3_fast_half_128x128"));
  p.fast_accumulate = false;
  CHECK_EQ(name(p, 128), std::string("mma_e4m3_e4m3_half_128x128"));
  p.m = 64;
  CHECK_EQ(name(p, 128), std::string("mma_e4m3_e4m3_half_64x64"));
  p.aligned = false;
  CHECK_EQ(name(p, 128), std::string("mma_e4m3_e4m3_half_64x64_bytes"));
  p.hopper = true;
  CHECK_EQ(name(p, 128), std::string("mma_e4m3_e4m3_half_64x64_bytes"));
}

TEST(which_gpus_multiply_fp8) {
  for (const auto& [major, minor] : {std::pair{8, 9}, {9, 0}, {10, 0}, {10, 3}, {12, 0}})
    CHECK(multiplies_fp8(major, minor));
  for (const auto& [major, minor] : {std::pair{7, 5}, {8, 0}, {8, 6}, {8, 7}})
    CHECK(!multiplies_fp8(major, minor));
}

TEST(a_margin_of_multiprocessors_is_left_by_hoppers_persistent_kernels) {
  GemmProblem hopper{4096, 4096, 4096}, other = hopper, odd = hopper;
  other.hopper = odd.aligned = false;
  set_sm_margin(20);
  CHECK_EQ(sms_of_product(hopper, 132), 112);
  CHECK_EQ(choose_gemm(hopper, sms_of_product(hopper, 132)).launch.sm_count, 112);
  CHECK_EQ(sms_of_product(other, 132), 132);
  CHECK_EQ(sms_of_product(odd, 132), 132);
  set_sm_margin(1000);
  CHECK_EQ(sms_of_product(hopper, 132), 2);
  CHECK_EQ(sms_of_product(hopper, 1), 1);  // which choose_gemm refuses by name
  set_sm_margin(0);
  CHECK_EQ(sms_of_product(hopper, 132), 132);
  CHECK_THROWS(set_sm_margin(-1), "wanted a number of multiprocessors from 0 on, got -1");
}

TEST(what_no_kernel_serves_is_refused_by_name) {
  GemmProblem p{64, 64, 64};
  p.a = p.b = DType::e5m2;
  CHECK_THROWS(choose_gemm(p, 132), "no CUDA kernel for e5m2 x e5m2 to bf16; at least one operand");
  p = {64, 64, 64};
  p.out = DType::e4m3;
  p.accumulate = true;
  CHECK_THROWS(choose_gemm(p, 132), "FP8 cannot be accumulated into");
  p = {64, 64, 64};
  p.a = DType::e5m2;
  p.scales = GemmScales::tiles;
  CHECK_THROWS(choose_gemm(p, 132), "e5m2 x e4m3 to bf16, scales of 1 x 128 by 128 x 128");
  CHECK_THROWS(choose_gemm({0, 64, 64}, 132), "empty product [0, 64] over K = 64");
  CHECK_THROWS(choose_gemm({64, 64, 64}, 1), "two multiprocessors, got 1");
  p = {64, 64, 64};
  p.hopper = false;
  CHECK_THROWS(choose_gemm(p, 0), "a GPU has multiprocessors, got 0");
  p.scales = GemmScales::tiles;
  CHECK_THROWS(choose_gemm(p, 128), "scales of 1 x 128 by 128 x 128, by mma.sync");
}

GemmArguments good() {
  static float scale = 1.0f;
  const auto at = [](uintptr_t address, DType type, int64_t rows, int64_t cols) {
    TensorView v;
    v.data = reinterpret_cast<void*>(address);
    v.dtype = type;
    v.rows = rows;
    v.cols = cols;
    return v;
  };
  GemmArguments g;
  g.a = at(0x1000, DType::e4m3, 7, 32);
  g.b = at(0x2000, DType::e4m3, 48, 32);
  g.out = at(0x3000, DType::bf16, 7, 48);
  g.scale_a = g.scale_b = &scale;
  return g;
}

TEST(arguments_are_checked_before_anything_runs) {
  check_gemm_cuda(good());
  GemmArguments g = good();
  g.a.cols = g.b.cols = 40;
  check_gemm_cuda(g);
  CHECK(!gemm_problem(g).aligned);
  g = good();
  CHECK(gemm_problem(g).aligned && gemm_problem(g, 9).hopper && !gemm_problem(g, 8).hopper);
  g.b.rows = g.out.cols = 50;
  check_gemm_cuda(g);
  CHECK(!gemm_problem(g).aligned);
  g = good();
  g.b.data = reinterpret_cast<void*>(0x2008);
  check_gemm_cuda(g);
  CHECK(!gemm_problem(g).aligned);
  g = good();
  g.out.data = reinterpret_cast<void*>(0x3001);
  CHECK_THROWS(check_gemm_cuda(g), "out is bf16 and must start at a multiple of 2 bytes");
  g = good();
  g.a.rows = g.out.rows = int64_t(1) << 31;
  CHECK_THROWS(check_gemm_cuda(g), "M must be at most 2147418112 on CUDA, got 2147483648");
  g = good();
  g.a.dtype = g.b.dtype = DType::e5m2;
  check_gemm(g);
  CHECK_THROWS(check_gemm_cuda(g), "e5m2 x e5m2 has no CUDA kernel");
  g = good();
  g.b.cols = 48;  // [K, N] where [N, K] is wanted
  CHECK_THROWS(check_gemm(g), "must share K, got [7, 32] and [48, 48]");
  g = good();
  g.out.rows = 48;
  g.out.cols = 7;
  CHECK_THROWS(check_gemm(g), "out must be [7, 48], got [48, 7]");
  g = good();
  g.a.dtype = DType::bf16;
  CHECK_THROWS(check_gemm(g), "must be e4m3 or e5m2, got bf16 and e4m3");
  g = good();
  g.out.dtype = DType::e4m3;
  CHECK_THROWS(check_gemm(g), "FP8 out needs a scale and an amax");
  float amax = 0.0f;
  g.out_scale = g.amax = &amax;
  check_gemm_cuda(g);
  g.accumulate = true;
  CHECK_THROWS(check_gemm(g), "FP8 cannot be accumulated into");
  g.out.dtype = DType::f32;
  CHECK_THROWS(check_gemm(g), "a scale and an amax go with FP8 out, got f32");
  g = good();
  g.accumulate = true;
  g.bias = &amax;
  CHECK_THROWS(check_gemm(g), "bias and accumulate exclude each other");
}

}  // namespace
}  // namespace quaver
