// CUTLASS's tile schedulers, run on the host with what the chooser gives them: every step of K of
// every tile is computed once, and the workspace is large enough. Built where CUTLASS is.
#include <cuda_runtime.h>

// CUTLASS's headers name these in functions for the device, none of which is called.
static const dim3 blockIdx, gridDim, threadIdx;
static inline void __syncthreads() {}
static inline void __syncwarp() {}
static inline void __threadfence() {}

#include <vector>

#include "cutlass/cutlass.h"
#include "cutlass/gemm/gemm.h"
#include "cutlass/gemm/kernel/sm90_tile_scheduler.hpp"
#include "cutlass/gemm/kernel/sm90_tile_scheduler_stream_k.hpp"
#include "quaver/gemm_choice.h"
#include "test.h"

namespace quaver {
namespace {

using Persistent = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90;
// Its static functions depend on the tile only through the arguments of Params::initialize.
using StreamK = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90StreamK<
    cute::Shape<cute::_128, cute::_128, cute::_128>, cute::Shape<cute::_2, cute::_1, cute::_1>>;
using cutlass::KernelHardwareInfo;
using cutlass::gemm::BatchedGemmCoord;
using cutlass::gemm::GemmCoord;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Setting {
  const GemmProblem& p;
  const GemmCandidate& c;
  BatchedGemmCoord shape{int(p.m), int(p.n), int(p.k), 1};
  GemmCoord tile{c.tactic->tile_m, c.tactic->tile_n, kGemmTileK};
  GemmCoord cluster{c.tactic->cluster_m, c.tactic->cluster_n, 1};
  KernelHardwareInfo hardware{0, c.launch.sm_count};

  dim3 blocks() const {
    return cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90Params::
        get_tiled_cta_shape_mnl(shape, tile, cluster);
  }
};

// Calls body(problem, candidate) for shapes around the borders of tiles, bands and waves.
template <class Body>
void for_each_candidate(GemmScheduler scheduler, Body body) {
  for (int sm_count : {78, 132})
    for (int64_t m : {1, 17, 128, 129, 640, 1024, 2064, 4096})
      for (int64_t n : {16, 128, 272, 1024, 2576, 4096})
        for (int64_t k : {16, 144, 1024, 8192})
          for (bool wgrad : {false, true}) {
            GemmProblem p{m, n, k};
            if (wgrad) p = {m, n, k, DType::e5m2, DType::e4m3, DType::f32, true, false};
            for (const GemmCandidate& c : gemm_candidates(p, sm_count))
              if (c.tactic->scheduler == scheduler) body(p, c);
          }
}

TEST(persistent_kernels_compute_every_tile_once) {
  int seen = 0;
  for_each_candidate(GemmScheduler::persistent, [&](const GemmProblem& p, const GemmCandidate& c) {
    const Setting s{p, c};
    using Order = Persistent::RasterOrderOptions;
    Persistent::Params params;
    params.initialize(s.shape, s.tile, s.cluster, s.hardware, c.launch.swizzle,
                      c.launch.along_m ? Order::AlongM : Order::AlongN);
    const int64_t rows = ceil_div(p.m, s.tile.m()), cols = ceil_div(p.n, s.tile.n());
    std::vector<int> times(rows * cols, 0);
    CHECK_EQ(int64_t(params.blocks_per_problem_), c.tiles);
    for (uint64_t i = 0; i < params.blocks_per_problem_; ++i) {
      const auto [m, n] = Persistent::get_work_idx_m_and_n(
          params.divmod_cluster_shape_minor_.divide(i), params.divmod_cluster_shape_major_,
          params.divmod_cluster_shape_minor_, params.divmod_cluster_blk_major_,
          params.log_swizzle_size_, params.raster_order_, i % s.cluster.m(), 0);
      CHECK(m >= 0 && n >= 0);
      if (m < rows && n < cols) ++times[m * cols + n];  // the others are padding
    }
    for (int t : times) CHECK_EQ(t, 1);
    ++seen;
  });
  CHECK(seen > 1000);
}

TEST(cut_work_computes_every_step_of_every_tile_once) {
  int seen = 0;
  for_each_candidate(GemmScheduler::stream_k, [&](const GemmProblem& p, const GemmCandidate& c) {
    const Setting s{p, c};
    using Mode = StreamK::DecompositionMode;
    using Order = StreamK::RasterOrderOptions;
    const auto order = c.launch.along_m ? Order::AlongM : Order::AlongN;
    const auto mode = c.launch.splits > 1 ? Mode::SplitK : Mode::StreamK;
    const auto reduction = StreamK::ReductionMode::Deterministic;
    const auto needed = static_cast<int64_t>(StreamK::Params::get_workspace_size(
        s.shape, s.tile, s.cluster, s.hardware, c.launch.splits, c.launch.swizzle, order, mode,
        reduction, 2, 32, 32, 1, 1));
    CHECK(needed <= c.workspace_bytes);
    StreamK::Params params;
    params.initialize(s.shape, s.tile, s.cluster, s.hardware, c.launch.splits, c.launch.swizzle,
                      order, reduction, mode, nullptr);
    const int64_t rows = ceil_div(p.m, s.tile.m()), cols = ceil_div(p.n, s.tile.n());
    const int64_t steps = ceil_div(p.k, kGemmTileK);
    std::vector<int> times(rows * cols * steps, 0);
    const uint64_t units = params.units_per_problem_ * params.divmod_splits_.divisor;
    for (uint64_t i = 0; i < units; ++i) {
      const dim3 block(i % s.cluster.m());
      uint32_t start = 0;
      auto work = StreamK::get_current_work_for_linear_idx(start, i, block, params);
      do {
        for (uint32_t k = 0; k < work.k_tile_count; ++k)
          if (work.M_idx < rows && work.N_idx < cols)
            ++times[(work.M_idx * cols + work.N_idx) * steps + work.K_idx + k];
      } while (StreamK::continue_current_work_for_linear_idx(i, start, block, work, params));
    }
    for (int t : times) CHECK_EQ(t, 1);
    ++seen;
  });
  CHECK(seen > 100);
}

}  // namespace
}  // namespace quaver
