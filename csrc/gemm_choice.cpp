// The choice of a matrix-product kernel, by a model with few numbers, each of which has a meaning:
// a choice can then be explained, and measurements on a GPU correct the numbers, not the rules.
#include "quaver/gemm_choice.h"

#include <algorithm>
#include <atomic>
#include <iomanip>
#include <sstream>

#include "gemm_mma_tactics.h"
#include "gemm_tactics.h"
#include "quaver/gemm_table.h"

namespace quaver {
namespace {

constexpr bool kFast = true, kPromoted = false;
constexpr bool kPlain = false, kSource = true;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

GemmOut out_class(DType out) {
  if (is_fp8(out)) return GemmOut::fp8;
  return out == DType::f32 ? GemmOut::f32 : GemmOut::half;
}

// Hopper's wgmma is faster than its mma.sync, which therefore serves what TMA refuses alone.
bool fits_machine(const GemmTactic& t, const GemmProblem& p) {
  if (t.schedule != GemmSchedule::warps) return p.hopper && p.aligned;
  return t.copies == GemmCopies::bytes ? !p.aligned : p.aligned && !p.hopper;
}

bool serves(const GemmTactic& t, const GemmProblem& p) {
  return fits_machine(t, p) && t.a == p.a && t.b == p.b && t.out == out_class(p.out) &&
         t.scales == p.scales && (p.fast_accumulate || !t.fast) && (t.source || !p.accumulate);
}

// Of mma.sync a warp reads its rows of both operands from shared memory, twice as many bytes for
// each product in 32 x 32 of a 64 x 64 tile as in 64 x 32 and less in flight; single bytes go
// through registers.
double rate_of_warps(const GemmTactic& t) {
  double r = t.tile_m < 128 ? 0.7 : 1.0;
  if (t.copies == GemmCopies::bytes) r *= 0.25;
  return t.fast ? r : r * 0.93;
}

// The part of the tensor cores' peak that a tile's main loop reaches: a warpgroup reads a 64-row
// slice of A and all of B's tile from shared memory for each instruction, so larger tiles are
// bound by it less. Promotion adds to f32 registers between the instructions of every 128 of K. Cut
// work must be worth its trouble.
double rate(const GemmTactic& t) {
  double r = 1.0;
  if (t.schedule == GemmSchedule::warps) return rate_of_warps(t);
  if (t.tile_n < 256) r *= 0.93;
  if (t.tile_m < 128) r *= 0.85;
  if (!t.fast) r *= 0.93;
  if (t.scheduler == GemmScheduler::stream_k) r *= 0.96;
  return r;
}

// Pingpong hides a tile's epilogue behind the products of the other warpgroup's tile, if it has
// one.
bool hides(const GemmTactic& t, double waves) {
  return t.schedule == GemmSchedule::pingpong && waves > 1.0;
}

// The cost of a tile beside its products, in elements of K: filling the pipeline, and the epilogue.
double overhead(const GemmTactic& t, double waves) { return hides(t, waves) ? 96.0 : 384.0; }

// Partial sums in f32 go to memory and come back: a tile's are 4 bytes for each 2 K flops, so for
// one multiprocessor's share of the memory rate this is the same for every tile.
constexpr double kSplitOverhead = 1536.0;

// The number of tiles as CUTLASS rounds it up, so that bands of `swizzle` clusters are whole.
int64_t padded_tiles(const GemmTactic& t, const GemmProblem& p, int swizzle) {
  return round_up(ceil_div(p.m, t.tile_m), int64_t(swizzle) * t.cluster_m) *
         round_up(ceil_div(p.n, t.tile_n), int64_t(swizzle) * t.cluster_n);
}

// The widest bands that add no wave. CUTLASS itself takes narrower ones where either axis has fewer
// than 6, 3 or 2 tiles.
int choose_swizzle(const GemmTactic& t, const GemmProblem& p, int64_t slots) {
  const int64_t least = std::min(ceil_div(p.m, t.tile_m), ceil_div(p.n, t.tile_n));
  const int64_t waves = ceil_div(padded_tiles(t, p, 1), slots);
  for (const auto& [swizzle, axis] : {std::pair{8, 6}, {4, 3}, {2, 2}})
    if (waves > 1 && least >= axis && ceil_div(padded_tiles(t, p, swizzle), slots) == waves)
      return swizzle;
  return 1;
}

// CUTLASS keeps partial sums of whole tiles in f32, and a 4-byte lock for each of its two
// warpgroups; each part is rounded up to 128 bytes. Evenly cut work touches the tiles of at most
// two waves.
int64_t workspace_of(const GemmTactic& t, int64_t tiles, int splits, int sm_count) {
  const int64_t cut = splits > 1 ? tiles : std::min<int64_t>(tiles, 2 * sm_count);
  return round_up(cut * t.tile_m * t.tile_n * 4, 128) + round_up(cut * 2 * 4, 128);
}

// Tiles in M of a band, whose rows of `a` stay in the L2 cache while the band goes through `b`.
constexpr int kBand = 8;

// A multiprocessor has one tile after another, or some of the smaller ones at a time, which take as
// long together.
void evaluate_warps(GemmCandidate* c, const GemmProblem& p, double k) {
  const GemmTactic& t = *c->tactic;
  c->launch.swizzle = kBand;
  c->tiles = ceil_div(p.m, t.tile_m) * ceil_div(p.n, t.tile_n);
  c->waves = double(c->tiles) / double(c->launch.sm_count);
  const double time = double(ceil_div(c->tiles, c->launch.sm_count)) * (k + overhead(t, c->waves));
  c->efficiency = double(p.m) * double(p.n) * double(std::max<int64_t>(p.k, 1)) /
                  (time * t.tile_m * t.tile_n / rate(t) * double(c->launch.sm_count));
}

GemmCandidate evaluate(const GemmTactic& t, int index, const GemmProblem& p, int sm_count) {
  GemmCandidate c;
  c.tactic = &t;
  c.index = index;
  c.launch.sm_count = sm_count;
  const double k = double(round_up(std::max<int64_t>(p.k, 1), kGemmTileK));
  if (t.schedule == GemmSchedule::warps) {
    evaluate_warps(&c, p, k);
    return c;
  }
  const int64_t cluster = t.cluster_m * t.cluster_n;
  const int64_t slots = sm_count / cluster * cluster;
  c.launch.swizzle = choose_swizzle(t, p, slots);
  c.launch.along_m = ceil_div(p.m, t.tile_m) <= ceil_div(p.n, t.tile_n);
  c.tiles = padded_tiles(t, p, c.launch.swizzle);
  c.waves = double(c.tiles) / double(slots);
  double time;  // of one multiprocessor, in elements of K of a whole tile
  if (t.scheduler == GemmScheduler::stream_k) {
    const int64_t steps = ceil_div(std::max<int64_t>(p.k, 1), kGemmTileK);
    // At least 8 steps a part, as CUTLASS wants for evenly cut work too.
    c.launch.splits = static_cast<int>(std::max<int64_t>(
        1, std::min({slots / std::max<int64_t>(c.tiles, 1), steps / 8, int64_t(16)})));
    if (c.launch.splits > 1)
      time = double(ceil_div(steps, c.launch.splits)) * kGemmTileK + overhead(t, c.waves) +
             kSplitOverhead;
    else
      time = std::max(c.waves, 1.0) * (k + overhead(t, c.waves)) + kSplitOverhead;
    c.workspace_bytes = workspace_of(t, c.tiles, c.launch.splits, sm_count);
  } else {
    time = double(ceil_div(c.tiles, slots)) * (k + overhead(t, c.waves));
  }
  const double done = double(p.m) * double(p.n) * double(std::max<int64_t>(p.k, 1));
  const double spent = time * t.tile_m * t.tile_n / rate(t) * double(sm_count);
  c.efficiency = spent > 0 ? done / spent : 0.0;
  return c;
}

std::string text_of(const GemmProblem& p) {
  std::ostringstream s;
  s << name_of(p.a) << " x " << name_of(p.b) << " to " << name_of(p.out)
    << (p.accumulate ? ", accumulated" : "")
    << (p.scales == GemmScales::tiles    ? ", scales of 1 x 128 by 128 x 128"
        : p.scales == GemmScales::blocks ? ", scales of 1 x 128 by 1 x 128"
                                         : "")
    << (p.hopper ? "" : ", by mma.sync");
  return s.str();
}

GemmCandidate choose_anew(const GemmProblem& p, int sm_count) {
  const auto candidates = gemm_candidates(p, sm_count);
  const int measured = measured_tactic(p);
  const auto found = std::find_if(candidates.begin(), candidates.end(),
                                  [&](const GemmCandidate& c) { return c.index == measured; });
  return found == candidates.end() ? candidates.front() : *found;
}

int percent(double part) { return static_cast<int>(part * 100.0 + 0.5); }

}  // namespace

const std::vector<GemmTactic>& gemm_tactics() {
  static const std::vector<GemmTactic> tactics = {
#define QUAVER_ROW(NAME, A, B, OUT, SUMS, ADDEND, SCALES, TM, TN, CM, CN, SCHEDULE, SCHEDULER) \
  {#NAME,                                                                                      \
   DType::A,                                                                                   \
   DType::B,                                                                                   \
   GemmOut::OUT,                                                                               \
   SUMS,                                                                                       \
   ADDEND,                                                                                     \
   GemmScales::SCALES,                                                                         \
   TM,                                                                                         \
   TN,                                                                                         \
   CM,                                                                                         \
   CN,                                                                                         \
   GemmSchedule::SCHEDULE,                                                                     \
   GemmScheduler::SCHEDULER,                                                                   \
   GemmCopies::tma},
      QUAVER_GEMM_TACTICS(QUAVER_ROW)
#undef QUAVER_ROW
#define QUAVER_ROW(NAME, A, B, OUT, SUMS, TM, TN, COPIES) \
  {#NAME,                                                 \
   DType::A,                                              \
   DType::B,                                              \
   GemmOut::OUT,                                          \
   SUMS,                                                  \
   GemmOut::OUT != GemmOut::fp8,                          \
   GemmScales::outer,                                     \
   TM,                                                    \
   TN,                                                    \
   1,                                                     \
   1,                                                     \
   GemmSchedule::warps,                                   \
   GemmScheduler::persistent,                             \
   GemmCopies::COPIES},
          QUAVER_GEMM_MMA_TACTICS(QUAVER_ROW)
#undef QUAVER_ROW
  };
  return tactics;
}

int hopper_tactics() {
  const auto& all = gemm_tactics();
  const auto is_warps = [](const GemmTactic& t) { return t.schedule == GemmSchedule::warps; };
  return static_cast<int>(std::find_if(all.begin(), all.end(), is_warps) - all.begin());
}

GemmProblem gemm_problem(const GemmArguments& a, int major) {
  const auto fits = [](uintptr_t x) { return x % kGemmAlignment == 0; };
  const auto starts = [&](const TensorView& v) {
    return fits(reinterpret_cast<uintptr_t>(v.data));
  };
  const bool aligned = fits(static_cast<uintptr_t>(a.a.cols)) &&
                       fits(static_cast<uintptr_t>(a.out.cols)) && starts(a.a) && starts(a.b) &&
                       starts(a.out);
  return {a.out.rows,   a.out.cols,        a.a.cols, a.a.dtype,  a.b.dtype, a.out.dtype,
          a.accumulate, a.fast_accumulate, a.scales, major == 9, aligned};
}

std::vector<GemmCandidate> gemm_candidates(const GemmProblem& p, int sm_count) {
  QUAVER_CHECK(p.m > 0 && p.n > 0 && p.k >= 0, "gemm: no tactic for an empty product [", p.m, ", ",
               p.n, "] over K = ", p.k);
  QUAVER_CHECK(sm_count >= (p.hopper ? 2 : 1),
               p.hopper ? "gemm: a cluster takes two multiprocessors, got "
                        : "gemm: a GPU has multiprocessors, got ",
               sm_count);
  std::vector<GemmCandidate> found;
  const auto& tactics = gemm_tactics();
  for (size_t i = 0; i < tactics.size(); ++i)
    if (serves(tactics[i], p))
      found.push_back(evaluate(tactics[i], static_cast<int>(i), p, sm_count));
  QUAVER_CHECK(!found.empty(), "gemm: no CUDA kernel for ", text_of(p),
               is_fp8(p.out) && p.accumulate              ? "; FP8 cannot be accumulated into"
               : p.a == DType::e5m2 && p.b == DType::e5m2 ? "; at least one operand must be e4m3"
                                                          : "");
  std::stable_sort(found.begin(), found.end(), [](const GemmCandidate& a, const GemmCandidate& b) {
    return a.efficiency > b.efficiency;
  });
  return found;
}

namespace {
std::atomic<int> margin{0};
}

void set_sm_margin(int count) {
  QUAVER_CHECK(count >= 0, "sm_margin: wanted a number of multiprocessors from 0 on, got ", count);
  margin = count;
}

int sm_margin() { return margin; }

int sms_of_product(const GemmProblem& p, int sm_count) {
  return p.hopper && p.aligned ? std::max(sm_count - sm_margin(), std::min(sm_count, 2)) : sm_count;
}

// A training step repeats the shapes of the last one, so each thread remembers what it chose.
GemmCandidate choose_gemm(const GemmProblem& p, int sm_count) {
  struct Choice {
    GemmProblem problem;
    int sm_count = 0;
    int64_t table = 0;   // its version
    GemmCandidate best;  // no tactic: the place is free
  };
  constexpr uint64_t places = 256;
  static thread_local std::vector<Choice> choices(places);
  const int64_t table = gemm_table_version();
  uint64_t hash = 0;
  for (const int64_t part : {p.m, p.n, p.k, int64_t(p.a), int64_t(p.out), int64_t(p.accumulate)})
    hash = (hash ^ uint64_t(part)) * 0x9e3779b97f4a7c15u;
  Choice& c = choices[(hash >> 32) % places];
  const bool same = c.problem == p && c.sm_count == sm_count && c.table == table;
  if (c.best.tactic == nullptr || !same) c = {p, sm_count, table, choose_anew(p, sm_count)};
  return c.best;
}

std::string explain_gemm(const GemmProblem& p, const std::vector<GemmCandidate>& candidates) {
  const GemmCandidate& c = candidates.front();
  const GemmTactic& t = *c.tactic;
  std::ostringstream s;
  s << std::fixed << std::setprecision(2);
  s << c.tiles << " tiles of " << t.tile_m << " x " << t.tile_n << " are " << c.waves
    << " waves of " << c.launch.sm_count << " multiprocessors";
  if (t.schedule == GemmSchedule::warps)
    s << "; warps share a tile by mma.sync"
      << (p.aligned
              ? ""
              : ", and operands come byte by byte, as N, K or a pointer is no multiple of 16");
  if (c.launch.splits > 1)
    s << "; K is cut into " << c.launch.splits << " parts to use those that would idle";
  else if (t.scheduler == GemmScheduler::stream_k)
    s << "; the work is cut evenly along K, so that the last wave is full";
  if (t.schedule == GemmSchedule::warps)
    s << (t.tile_m < 128 ? "; small tiles occupy the most multiprocessors"
                         : "; large tiles read the least shared memory");
  else if (hides(t, c.waves))
    s << "; two warpgroups take turns, so that one's epilogue hides behind the other's products";
  else if (t.schedule == GemmSchedule::pingpong)
    s << "; small tiles occupy the most multiprocessors";
  else
    s << "; two warpgroups share a tile, which reads the least shared memory";
  if (t.scales != GemmScales::outer)
    s << "; sums are scaled and promoted to f32 each 128 of K, as the scales lie";
  else if (!t.fast)
    s << (p.fast_accumulate
              ? "; sums are promoted to f32, as no faster kernel serves this problem better"
              : "; sums are promoted to f32 each 128 of K, as asked");
  s << ". Predicted " << percent(c.efficiency) << " % of the peak";
  if (candidates.size() > 1)
    s << ", before " << candidates[1].tactic->name << " with " << percent(candidates[1].efficiency)
      << " %";
  s << ".";
  return s.str();
}

}  // namespace quaver
