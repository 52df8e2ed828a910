// The main loop of promoted sums in a tile of 256 columns. Two sets of its accumulators do not fit
// into the registers of two warpgroups; a set, and one of half the columns do. Each 128 of K is
// multiplied by one half of B's columns and then by the other, and each half is added to the sums
// as soon as it is there, while the other warpgroup multiplies. (CUTLASS's loop, which it replaces,
// adds the same numbers in the same order; DeepGEMM multiplies in blocks of 128 columns too.)
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/gemm/collective/collective_mma_decl.hpp"

namespace quaver::cuda::gemm_sm90 {

// Base: CUTLASS's loop for promoted FP8 of two warpgroups.
template <class Base>
struct HalvesMainloop : Base {
  static constexpr int kTileM = cute::size<0>(typename Base::TileShape{});
  static constexpr int kHalf = cute::size<1>(typename Base::TileShape{}) / 2;
  static constexpr int kTileK = cute::size<2>(typename Base::TileShape{});
  using Atom = decltype(cute::GMMA::ss_op_selector<
                        typename Base::TiledMma::ValTypeA, typename Base::TiledMma::ValTypeB, float,
                        cute::Shape<cute::Int<kTileM>, cute::Int<kHalf>, cute::Int<kTileK>>>());
  using HalfMma = decltype(cute::make_tiled_mma(
      Atom{}, cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>{}));

  // Adds the products of the tile over all of K to `sums`, which it clears.
  template <class Sums>
  CUTLASS_DEVICE void mma(typename Base::MainloopPipeline pipeline,
                          typename Base::PipelineState stage, Sums& sums, int k_tile_count,
                          int thread, typename Base::TensorStorage& shared,
                          typename Base::Params const&) {
    using namespace cute;
    Tensor a = make_tensor(make_smem_ptr(shared.smem_A.data()), typename Base::SmemLayoutA{});
    Tensor b = make_tensor(make_smem_ptr(shared.smem_B.data()), typename Base::SmemLayoutB{});
    // Descriptors are the same in all threads of a warpgroup.
    const int group = __shfl_sync(0xffffffffu, thread / cutlass::NumThreadsPerWarpGroup, 0);
    HalfMma multiply;
    auto slice = multiply.get_slice(group * cutlass::NumThreadsPerWarpGroup);
    Tensor of_a = slice.make_fragment_A(slice.partition_A(a));  // (MMA, 1, K, stage)
    Tensor of_b = slice.make_fragment_B(slice.partition_B(b));  // (MMA, 2, K, stage)
    Tensor products = partition_fragment_C(multiply, Shape<Int<kTileM>, Int<kHalf>>{});
    static_assert(2 * decltype(size(products))::value == decltype(size(sums))::value,
                  "a thread's sums are those of one half, then of the other");
    clear(sums);
    for (; k_tile_count > 0; --k_tile_count) {
      pipeline.consumer_wait(stage, pipeline.consumer_try_wait(stage));
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        multiply.accumulate_ = GMMA::ScaleOut::Zero;
        warpgroup_fence_operand(products);
        warpgroup_arrive();
        CUTLASS_PRAGMA_UNROLL
        for (int k = 0; k < size<2>(of_a); ++k) {
          cute::gemm(multiply, of_a(_, 0, k, stage.index()), of_b(_, half, k, stage.index()),
                     products(_, 0, 0));
          multiply.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
        warpgroup_wait<0>();
        warpgroup_fence_operand(products);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < size(products); ++i) sums(half * size(products) + i) += products(i);
      }
      pipeline.consumer_release(stage);
      ++stage;
    }
  }

  // No stage is left to be released.
  CUTLASS_DEVICE void mma_tail(typename Base::MainloopPipeline, typename Base::PipelineState, int) {
  }
};

}  // namespace quaver::cuda::gemm_sm90
