// The choice of a matrix-product kernel. The table of tactics and the choice among them are plain
// functions of the shape: no GPU is needed to see what would run, and why.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "quaver/gemm.h"

namespace quaver {

// One compiled kernel.
struct GemmTactic {
  const char* name;
  DType a, b;
  GemmOut out;
  bool fast;    // keeps sums in the tensor core; otherwise they are promoted to f32 each 128 of K
  bool source;  // can add to out
  GemmScales scales;
  int tile_m, tile_n;
  int cluster_m, cluster_n;
  GemmSchedule schedule;
  GemmScheduler scheduler;
  GemmCopies copies;
};

// The inputs of a choice.
struct GemmProblem {
  int64_t m = 0, n = 0, k = 0;
  DType a = DType::e4m3, b = DType::e4m3, out = DType::bf16;
  bool accumulate = false;
  bool fast_accumulate = true;
  GemmScales scales = GemmScales::outer;
  bool hopper = true;   // the GPU has TMA and wgmma; others from sm_89 on have mma.sync
  bool aligned = true;  // pointers, N and K are multiples of 16, as TMA and cp.async want them

  // All members, by which problems are ordered and equal.
  auto members() const {
    return std::tie(m, n, k, a, b, out, accumulate, fast_accumulate, scales, hopper, aligned);
  }
};

inline bool operator<(const GemmProblem& a, const GemmProblem& b) {
  return a.members() < b.members();
}
inline bool operator==(const GemmProblem& a, const GemmProblem& b) {
  return a.members() == b.members();
}

// A tactic on a problem, by a model of the machine (csrc/gemm_choice.cpp).
struct GemmCandidate {
  const GemmTactic* tactic = nullptr;
  int index = -1;         // in gemm_tactics()
  GemmLaunch launch;      // all but stream and workspace
  int64_t tiles = 0;      // padded to whole clusters and bands
  double waves = 0;       // of tiles over the multiprocessors
  double efficiency = 0;  // predicted part of the tensor cores' peak, 0 to 1
  int64_t workspace_bytes = 0;
};

// Those of Hopper, csrc/gemm_tactics.h, then those of mma.sync, csrc/gemm_mma_tactics.h.
const std::vector<GemmTactic>& gemm_tactics();
int hopper_tactics();  // how many are the first
// Of a GPU of this compute capability.
GemmProblem gemm_problem(const GemmArguments& arguments, int major = 9);
// Whether a GPU has instructions for FP8 products.
inline bool multiplies_fp8(int major, int minor) { return 10 * major + minor >= 89; }

// The multiprocessors that Hopper's persistent kernels leave free, of this process: a message
// beside a product waits for one of them, not for the product. None by default.
void set_sm_margin(int count);
int sm_margin();
// Those that a product may have of the GPU's, at least a cluster's two.
int sms_of_product(const GemmProblem& problem, int sm_count);

// Every tactic that can serve the problem, best first; throws Error where there is none.
std::vector<GemmCandidate> gemm_candidates(const GemmProblem& problem, int sm_count);
// The one that was measured to be the fastest (gemm_table.h), else the first of them.
GemmCandidate choose_gemm(const GemmProblem& problem, int sm_count);
// Why the first one comes before the others, in words.
std::string explain_gemm(const GemmProblem& problem, const std::vector<GemmCandidate>& candidates);

}  // namespace quaver
