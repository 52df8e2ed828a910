// gemm by mma.sync: from a row of csrc/gemm_mma_tactics.h to its kernel (gemm_mma.h).
#include "../arguments.h"
#include "../gemm_mma_tactics.h"
#include "gemm_mma.h"

namespace quaver::cuda {
namespace {

MmaProblem problem_of(const GemmArguments& g, const GemmLaunch& l) {
  MmaProblem p;
  p.a = g.a.as<const uint8_t>();
  p.b = g.b.as<const uint8_t>();
  p.out = g.out.data;
  p.scale_a = g.scale_a;
  p.scale_b = g.scale_b;
  p.bias = g.bias;
  p.out_scale = g.out_scale;
  p.amax = reinterpret_cast<uint32_t*>(g.amax);
  p.m = static_cast<int>(g.out.rows);
  p.n = static_cast<int>(g.out.cols);
  p.k = static_cast<int>(g.a.cols);
  p.band = l.swizzle;
  p.rows_a = g.rows_a;
  p.rows_b = g.rows_b;
  p.accumulate = g.accumulate;
  p.second = g.out.dtype == DType::f16 || g.out.dtype == DType::e5m2;
  return p;
}

template <class T>
void run(const GemmArguments& g, const GemmLaunch& l) {
  const int64_t blocks = ceil_div(g.out.rows, T::kM) * ceil_div(g.out.cols, T::kN);
  launch("gemm", gemm_mma_kernel<T>, blocks, T::kThreads, l.stream, problem_of(g, l));
}

constexpr void (*kRun[])(const GemmArguments&, const GemmLaunch&) = {
#define QUAVER_ROW(NAME, A, B, OUT, SUMS, TILE_M, TILE_N, COPIES) \
  run<MmaTactic<A, B, GemmOut::OUT, SUMS, TILE_M, TILE_N,         \
                GemmCopies::COPIES == GemmCopies::vectors>>,
    QUAVER_GEMM_MMA_TACTICS(QUAVER_ROW)
#undef QUAVER_ROW
};

}  // namespace

void gemm_mma(const GemmArguments& arguments, int row, const GemmLaunch& launch) {
  check_gemm_cuda(arguments);
  if (arguments.amax != nullptr) clear("gemm", arguments.amax, sizeof(float), launch.stream);
  kRun[row](arguments, launch);
}

}  // namespace quaver::cuda
