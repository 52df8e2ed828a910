// One CUTLASS 3 kernel: TMA loads, FP8 wgmma and an epilogue whose scales, bias, addend and format
// are arguments. A kernel takes about a minute to compile, so what can be an argument is one.
// (NVIDIA CUTLASS 4.2, examples 48, 49, 54 and 67.)
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"

// These replace collective_builder.hpp and gemm_universal.hpp, which include the kernels of all
// architectures.
#include "cutlass/gemm/collective/builders/sm90_gmma_builder.inl"
#include "cutlass/gemm/collective/collective_mma_decl.hpp"
#include "cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized.hpp"
#include "cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized_fp8.hpp"
#include "cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized_fp8_blockwise_scaling.hpp"
#include "cutlass/gemm/kernel/gemm_universal_decl.h"
#include "cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_cooperative.hpp"
#include "cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_pingpong.hpp"
#include "cutlass/gemm/kernel/tile_scheduler.hpp"
#include "gemm_epilogue_sm90.h"
#include "gemm_halves_sm90.h"
#include "launch.h"
#include "quaver/gemm.h"
#include "quaver/layout.h"

namespace quaver::cuda {
namespace gemm_sm90 {

template <class T> struct Element;
template <> struct Element<e4m3> {
  using type = cutlass::float_e4m3_t;
};
template <> struct Element<e5m2> {
  using type = cutlass::float_e5m2_t;
};

constexpr bool kFast = true, kPromoted = false;
constexpr bool kPlain = false, kSource = true;

template <GemmSchedule kSchedule, bool kFastSums> struct Schedules;
template <> struct Schedules<GemmSchedule::cooperative, kFast> {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};
template <> struct Schedules<GemmSchedule::cooperative, kPromoted> {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};
template <> struct Schedules<GemmSchedule::pingpong, kFast> {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};
template <> struct Schedules<GemmSchedule::pingpong, kPromoted> {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

// What the main loop is told of scales: each operand's layout in memory, and the schedule.
template <GemmScales kScales, class Mainloop>
struct Operands {
  using A = cutlass::layout::RowMajor;
  using B = cutlass::layout::ColumnMajor;
  using Schedule = Mainloop;
};

// Scales as casts write them: [rows, K / 128], or [rows / 128, K / 128] of tiles, rounded up.
template <int kRowsOfB>
struct BlockOperands {
  static constexpr auto kAlongK = cute::GMMA::Major::K;
  using Config =
      cutlass::detail::Sm90BlockwiseScaleConfig<1, kRowsOfB, kGemmTileK, kAlongK, kAlongK>;
  using A = cute::tuple<cutlass::layout::RowMajor, decltype(Config::deduce_layoutSFA())>;
  using B = cute::tuple<cutlass::layout::ColumnMajor, decltype(Config::deduce_layoutSFB())>;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8Blockwise;
};
template <class Mainloop>
struct Operands<GemmScales::tiles, Mainloop> : BlockOperands<kScaleTile> {};
template <class Mainloop>
struct Operands<GemmScales::blocks, Mainloop> : BlockOperands<1> {};

template <class A, class B, GemmOut kOut, bool kFastSums, bool kHasSource, GemmScales kScales,
          int kTileM, int kTileN, int kClusterM, int kClusterN, GemmSchedule kSchedule,
          GemmScheduler kScheduler>
struct Gemm {
  static_assert(kScales == GemmScales::outer ||
                    (kSchedule == GemmSchedule::cooperative && !kFastSums),
                "scales of blocks promote sums, in the cooperative schedule");
  using Tile = cute::Shape<Int<kTileM>, Int<kTileN>, Int<kGemmTileK>>;
  using Cluster = cute::Shape<Int<kClusterM>, Int<kClusterN>, _1>;
  using Schedule = Schedules<kSchedule, kFastSums>;
  using Bits = typename Stored<kOut>::type;
  using SourceBits = std::conditional_t<kHasSource, Bits, void>;
  using RowMajor = cutlass::layout::RowMajor;
  using Layouts = Operands<kScales, typename Schedule::Mainloop>;
  static constexpr int kOutAlignment = 16 / sizeof(Bits);

  using ScaleA = fusion::Sm90ColBroadcast<0, Tile, float, float, cute::Stride<bool, _0, int64_t>>;
  using ScaleB = fusion::Sm90RowBroadcast<0, Tile, float, float, cute::Stride<_0, bool, int64_t>>;
  using Bias = fusion::Sm90RowBroadcast<0, Tile, float, float, cute::Stride<_0, _1, int64_t>>;
  using Tree = std::conditional_t<
      kHasSource, fusion::Sm90EVT<Finish<kOut>, fusion::Sm90AccFetch, ScaleA, ScaleB, Bias, Source>,
      fusion::Sm90EVT<Finish<kOut>, fusion::Sm90AccFetch, ScaleA, ScaleB, Bias>>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, SourceBits, RowMajor,
      kOutAlignment, Bits, RowMajor, kOutAlignment, typename Schedule::Epilogue,
      Tree>::CollectiveOp;
  using Builder = cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename Element<A>::type,
      typename Layouts::A, kGemmAlignment, typename Element<B>::type, typename Layouts::B,
      kGemmAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      typename Layouts::Schedule>;
  using Mainloop = std::conditional_t<!kFastSums && kTileN == 256,
                                      HalvesMainloop<typename Builder::CollectiveOp>,
                                      typename Builder::CollectiveOp>;
  using Scheduler =
      std::conditional_t<kScheduler == GemmScheduler::stream_k, cutlass::gemm::StreamKScheduler,
                         cutlass::gemm::PersistentScheduler>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                      Epilogue, Scheduler>;

  static typename Tree::Arguments tree(const GemmArguments& p) {
    // No pointer: one for all, as the main loop has multiplied by scales of blocks.
    constexpr bool kOuter = kScales == GemmScales::outer;
    const typename ScaleA::Arguments scale_a{
        kOuter ? p.scale_a : nullptr, 1.0f, {p.rows_a, _0{}, 0}};
    const typename ScaleB::Arguments scale_b{
        kOuter ? p.scale_b : nullptr, 1.0f, {_0{}, p.rows_b, 0}};
    const typename Bias::Arguments bias{p.bias, 0.0f, {_0{}, _1{}, 0}};
    const FinishArguments finish{p.out.dtype == DType::f16 || p.out.dtype == DType::e5m2,
                                 p.accumulate, p.out_scale, reinterpret_cast<uint32_t*>(p.amax)};
    if constexpr (kHasSource)
      return {{}, scale_a, scale_b, bias, SourceArguments{p.accumulate}, finish};
    else
      return {{}, scale_a, scale_b, bias, finish};
  }

  static typename Kernel::Arguments arguments(const GemmArguments& p, const GemmLaunch& l) {
    typename Kernel::Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = cute::make_shape(
        static_cast<int>(p.out.rows), static_cast<int>(p.out.cols), static_cast<int>(p.a.cols), 1);
    args.mainloop.ptr_A = p.a.as<const typename Element<A>::type>();
    args.mainloop.dA = {p.a.cols, _1{}, 0};
    args.mainloop.ptr_B = p.b.as<const typename Element<B>::type>();
    args.mainloop.dB = {p.b.cols, _1{}, 0};
    if constexpr (kScales != GemmScales::outer) {
      args.mainloop.ptr_SFA = p.scale_a;
      args.mainloop.layout_SFA = Layouts::Config::tile_atom_to_shape_SFA(args.problem_shape);
      args.mainloop.ptr_SFB = p.scale_b;
      args.mainloop.layout_SFB = Layouts::Config::tile_atom_to_shape_SFB(args.problem_shape);
    }
    args.epilogue.thread = tree(p);
    if constexpr (kHasSource) args.epilogue.ptr_C = p.out.as<const Bits>();
    args.epilogue.dC = {p.out.cols, _1{}, 0};
    args.epilogue.ptr_D = p.out.as<Bits>();
    args.epilogue.dD = {p.out.cols, _1{}, 0};
    args.hw_info.sm_count = l.sm_count;
    using Order = std::decay_t<decltype(args.scheduler.raster_order)>;
    args.scheduler.max_swizzle_size = l.swizzle;
    args.scheduler.raster_order = l.along_m ? Order::AlongM : Order::AlongN;
    if constexpr (kScheduler == GemmScheduler::stream_k) {
      using Mode = std::decay_t<decltype(args.scheduler.decomposition_mode)>;
      args.scheduler.splits = l.splits;
      args.scheduler.decomposition_mode = l.splits > 1 ? Mode::SplitK : Mode::StreamK;
    }
    return args;
  }
};

// The kernel, a template of its tactic, by which profiles and the table of `make cuda` name it.
template <class Tactic>
__global__ void __launch_bounds__(Tactic::Kernel::MaxThreadsPerBlock,
                                  Tactic::Kernel::MinBlocksPerMultiprocessor)
    gemm_kernel(const __grid_constant__ typename Tactic::Kernel::Params params) {
  extern __shared__ char shared[];
  typename Tactic::Kernel{}(params, shared);
}

template <class Tactic>
void run(const GemmArguments& p, const GemmLaunch& l) {
  using G = typename Tactic::Gemm;
  using Kernel = typename Tactic::Kernel;
  const auto stream = static_cast<cudaStream_t>(l.stream);
  const auto args = G::arguments(p, l);
  const auto needed = static_cast<int64_t>(Kernel::get_workspace_size(args));
  QUAVER_CHECK(Kernel::can_implement(args), "gemm: CUTLASS refuses ", Tactic::name(), " for [",
               p.out.rows, ", ", p.out.cols, "] over K = ", p.a.cols);
  QUAVER_CHECK(needed <= l.workspace_bytes, "gemm: ", Tactic::name(), " needs a workspace of ",
               needed, " bytes, got ", l.workspace_bytes);
  QUAVER_CHECK(Kernel::initialize_workspace(args, l.workspace, stream) == cutlass::Status::kSuccess,
               "gemm: CUDA refused to clear the workspace of ", Tactic::name());
  const auto params = Kernel::to_underlying_arguments(args, l.workspace);
  auto* kernel = gemm_kernel<Tactic>;
  check_status("gemm", "CUDA refused the kernel's shared memory",
               cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    Kernel::SharedStorageSize));
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {cute::size<0>(typename G::Cluster{}),
                            cute::size<1>(typename G::Cluster{}), 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = Kernel::get_grid_shape(params);
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = Kernel::SharedStorageSize;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check_status("gemm", "CUDA refused a launch", cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace gemm_sm90
}  // namespace quaver::cuda

// Instantiates a row of csrc/gemm_tactics.h, in a translation unit of its own.
#define QUAVER_GEMM_UNIT(NAME, A, B, OUT, SUMS, ADDEND, SCALES, TILE_M, TILE_N, CLUSTER_M,       \
                         CLUSTER_N, SCHEDULE, SCHEDULER)                                         \
  namespace quaver::cuda::gemm_sm90 {                                                            \
  struct NAME {                                                                                  \
    static const char* name() { return #NAME; }                                                  \
    using Gemm =                                                                                 \
        gemm_sm90::Gemm<A, B, GemmOut::OUT, SUMS, ADDEND, GemmScales::SCALES, TILE_M, TILE_N,    \
                        CLUSTER_M, CLUSTER_N, GemmSchedule::SCHEDULE, GemmScheduler::SCHEDULER>; \
    using Kernel = typename Gemm::Kernel;                                                        \
  };                                                                                             \
  void run_##NAME(const GemmArguments& p, const GemmLaunch& l) { run<NAME>(p, l); }              \
  }
