// One CUTLASS 3 kernel: TMA loads, FP8 wgmma and an epilogue whose scales, bias, addend and format
// are arguments. A kernel takes about a minute to compile, so what can be an argument is one.
// (NVIDIA CUTLASS 4.2, examples 48, 49 and 54.)
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"

// These replace collective_builder.hpp and gemm_universal.hpp, which include the kernels of all
// architectures.
#include "cutlass/gemm/collective/builders/sm90_gmma_builder.inl"
#include "cutlass/gemm/collective/collective_mma_decl.hpp"
#include "cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized.hpp"
#include "cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized_fp8.hpp"
#include "cutlass/gemm/kernel/gemm_universal_decl.h"
#include "cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_cooperative.hpp"
#include "cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_pingpong.hpp"
#include "cutlass/gemm/kernel/tile_scheduler.hpp"
#include "launch.h"
#include "quaver/gemm.h"
#include "quaver/scale.h"

namespace quaver::cuda {
namespace gemm_sm90 {

namespace fusion = cutlass::epilogue::fusion;
using cute::_0;
using cute::_1;
using cute::Int;
using cutlass::Array;

template <class T> struct Element;
template <> struct Element<e4m3> {
  using type = cutlass::float_e4m3_t;
};
template <> struct Element<e5m2> {
  using type = cutlass::float_e5m2_t;
};

// Elements as they lie in memory. Formats of one size share a kernel, so they are bits to CUTLASS.
template <GemmOut kOut> struct Stored;
template <> struct Stored<GemmOut::half> {
  using type = uint16_t;
};
template <> struct Stored<GemmOut::f32> {
  using type = float;
};
template <> struct Stored<GemmOut::fp8> {
  using type = uint8_t;
};

// The parts of an epilogue node that ours do not need.
template <class P>
struct Node {
  struct SharedStorage {};
  using Arguments = P;
  using Params = P;
  Params params;

  CUTLASS_HOST_DEVICE Node() {}
  CUTLASS_HOST_DEVICE Node(const Params& p, const SharedStorage&) : params(p) {}
  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& a, void*) {
    return a;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      const fusion::detail::ProducerLoadArgs<Args...>&) {
    return fusion::detail::EmptyProducerLoadCallbacks{};
  }
};

struct SourceArguments {
  bool needed = false;
};

// The addend, as bits. The kernel loads it only if the call accumulates.
struct Source : Node<SourceArguments> {
  using Node<SourceArguments>::Node;
  CUTLASS_DEVICE bool is_producer_load_needed() const { return params.needed; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return params.needed; }

  template <class Tensor>
  struct Callbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    const Tensor& registers;
    CUTLASS_DEVICE Callbacks(const Tensor& r) : registers(r) {}
    template <class Accumulator, int kSize>
    CUTLASS_DEVICE auto visit(const Array<Accumulator, kSize>&, int v, int, int) {
      return cute::recast<Array<typename Tensor::value_type, kSize>>(registers)(v);
    }
  };
  template <bool, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const fusion::detail::ConsumerStoreArgs<Args...>& args) {
    return Callbacks<cute::remove_cvref_t<decltype(args.tCrC)>>(args.tCrC);
  }
};

struct FinishArguments {
  bool second = false;  // the format of this size that is not bf16 or e4m3: f16 or e5m2
  bool accumulate = false;
  const float* out_scale = nullptr;
  uint32_t* amax = nullptr;
};

template <class To, int kSize>
CUTLASS_DEVICE auto bits_of(const Array<float, kSize>& y) {
  using Bits = cute::uint_bit_t<cutlass::sizeof_bits<To>::value>;
  const Array<To, kSize> rounded = cutlass::NumericArrayConverter<To, float, kSize>{}(y);
  return reinterpret_cast<const Array<Bits, kSize>&>(rounded);
}

template <class From, class Bits, int kSize>
CUTLASS_DEVICE void add(Array<float, kSize>& y, const Array<Bits, kSize>& source) {
  static_assert(sizeof(From) == sizeof(Bits), "the source comes as bits");
  const auto& values = reinterpret_cast<const Array<From, kSize>&>(source);
  const Array<float, kSize> wide = cutlass::NumericArrayConverter<float, From, kSize>{}(values);
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kSize; ++i) y[i] += wide[i];
}

// The root node computes the stored value of (sum, scale_a, scale_b, bias, source), with one
// rounding.
template <GemmOut kOut>
struct Finish : Node<FinishArguments> {
  using Node<FinishArguments>::Node;
  using Bits = typename Stored<kOut>::type;

  template <class Coordinates, class Residue>
  struct Callbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    FinishArguments params;
    Coordinates coordinates;
    Residue residue;
    float scale = 1.0f;
    uint32_t seen = 0;  // bits of the largest magnitude; every NaN is above infinity

    CUTLASS_DEVICE Callbacks(const FinishArguments& p, const Coordinates& c, const Residue& r)
        : params(p), coordinates(c), residue(r) {
      if constexpr (kOut == GemmOut::fp8) scale = *p.out_scale;
    }

    template <class Accumulator, int kSize, class... Sources>
    CUTLASS_DEVICE Array<Bits, kSize> visit(const Array<Accumulator, kSize>&, int v, int m, int n,
                                            const Array<float, kSize>& sum,
                                            const Array<float, kSize>& scale_a,
                                            const Array<float, kSize>& scale_b,
                                            const Array<float, kSize>& bias,
                                            const Sources&... sources) {
      Array<float, kSize> y;
      // The scales first: each may be near a limit of f32 where their product is not.
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) y[i] = sum[i] * (scale_a[i] * scale_b[i]) + bias[i];
      if constexpr (kOut == GemmOut::fp8) {
        see(y, v, m, n);
        const bool exact = is_power_of_two(scale);
        const float inverse = 1.0f / scale;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kSize; ++i) y[i] = exact ? y[i] * inverse : y[i] / scale;
        return params.second ? bits_of<cutlass::float_e5m2_t>(y)
                             : bits_of<cutlass::float_e4m3_t>(y);
      } else if constexpr (kOut == GemmOut::f32) {
        if (params.accumulate) (add<float>(y, sources), ...);
        return y;
      } else {
        if (params.second) {
          if (params.accumulate) (add<cutlass::half_t>(y, sources), ...);
          return bits_of<cutlass::half_t>(y);
        }
        if (params.accumulate) (add<cutlass::bfloat16_t>(y, sources), ...);
        return bits_of<cutlass::bfloat16_t>(y);
      }
    }

    // The amax counts elements inside of the matrix only: outside, y is the bias, not zero.
    template <int kSize>
    CUTLASS_DEVICE void see(const Array<float, kSize>& y, int v, int m, int n) {
      auto here = coordinates(cute::_, cute::_, cute::_, m, n);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) {
        const uint32_t magnitude = bit_cast<uint32_t>(y[i]) & 0x7fffffffu;
        if (cute::elem_less(here(v * kSize + i), residue))
          seen = seen < magnitude ? magnitude : seen;
      }
    }

    // One atomic a warp and tile.
    CUTLASS_DEVICE void end() {
      if constexpr (kOut == GemmOut::fp8) {
        const uint32_t all = __reduce_max_sync(0xffffffffu, seen);
        if (threadIdx.x % 32 == 0 && all != 0) atomicMax(params.amax, all);
      }
    }
  };
  template <bool, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const fusion::detail::ConsumerStoreArgs<Args...>& args) {
    return Callbacks<cute::remove_cvref_t<decltype(args.tCcD)>,
                     cute::remove_cvref_t<decltype(args.residue_tCcD)>>(params, args.tCcD,
                                                                        args.residue_tCcD);
  }
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

template <class A, class B, GemmOut kOut, bool kFastSums, bool kHasSource, int kTileM, int kTileN,
          int kClusterM, int kClusterN, GemmSchedule kSchedule, GemmScheduler kScheduler>
struct Gemm {
  using Tile = cute::Shape<Int<kTileM>, Int<kTileN>, Int<kGemmTileK>>;
  using Cluster = cute::Shape<Int<kClusterM>, Int<kClusterN>, _1>;
  using Schedule = Schedules<kSchedule, kFastSums>;
  using Bits = typename Stored<kOut>::type;
  using SourceBits = std::conditional_t<kHasSource, Bits, void>;
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
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
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename Element<A>::type, RowMajor,
      kGemmAlignment, typename Element<B>::type, ColumnMajor, kGemmAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      typename Schedule::Mainloop>::CollectiveOp;
  using Scheduler =
      std::conditional_t<kScheduler == GemmScheduler::stream_k, cutlass::gemm::StreamKScheduler,
                         cutlass::gemm::PersistentScheduler>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                      Epilogue, Scheduler>;

  static typename Tree::Arguments tree(const GemmArguments& p) {
    const typename ScaleA::Arguments scale_a{p.scale_a, 0.0f, {p.rows_a, _0{}, 0}};
    const typename ScaleB::Arguments scale_b{p.scale_b, 0.0f, {_0{}, p.rows_b, 0}};
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
#define QUAVER_GEMM_UNIT(NAME, A, B, OUT, SUMS, ADDEND, TILE_M, TILE_N, CLUSTER_M, CLUSTER_N,  \
                         SCHEDULE, SCHEDULER)                                                  \
  namespace quaver::cuda::gemm_sm90 {                                                          \
  struct NAME {                                                                                \
    static const char* name() { return #NAME; }                                                \
    using Gemm = gemm_sm90::Gemm<A, B, GemmOut::OUT, SUMS, ADDEND, TILE_M, TILE_N, CLUSTER_M,  \
                                 CLUSTER_N, GemmSchedule::SCHEDULE, GemmScheduler::SCHEDULER>; \
    using Kernel = typename Gemm::Kernel;                                                      \
  };                                                                                           \
  void run_##NAME(const GemmArguments& p, const GemmLaunch& l) { run<NAME>(p, l); }            \
  }
