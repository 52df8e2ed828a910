// grouped_gemm: from the formats of a product to its kernel (grouped_gemm.h).
#include "grouped_gemm.h"
#include "quaver/check.h"

namespace quaver::cuda {
namespace {

constexpr const char* kOp = "grouped_gemm";

int scales_in_row(Grain grain, int64_t blocks) {
  return static_cast<int>(grain == Grain::block || grain == Grain::tile ? blocks : 1);
}

GroupedProblem problem_of(const GroupedGemm& g) {
  GroupedProblem p = {};
  p.a = g.a.as<const uint8_t>();
  p.b = g.b.as<const uint8_t>();
  p.out = g.out.data;
  p.scale_a = g.scale_a;
  p.scale_b = g.scale_b;
  p.n = static_cast<int>(g.n);
  p.m = static_cast<int>(g.weight ? g.m : g.a.rows);
  p.rows_a = static_cast<int>(g.a.rows);
  p.rows_b = static_cast<int>(g.weight || g.groups == 0 ? g.b.rows : g.b.rows / g.groups);
  p.k = static_cast<int>(g.a.cols);
  const int64_t rows = g.a.cols - g.groups * kGroupAlignment;  // of S, in whole sixteens
  const int64_t most = g.weight ? rows + kGroupAlignment - 1 : g.a.rows;
  p.of = {g.ends, static_cast<int>(most), static_cast<int>(g.groups)};
  const int64_t blocks =
      g.weight ? group_blocks(rows, g.groups) : blocks_in_row(g.a.cols, kScaleTile);
  p.per_row_a = scales_in_row(g.grain_a, blocks);
  p.per_row_b = scales_in_row(g.grain_b, blocks);
  p.grain_a = g.grain_a;
  p.grain_b = g.grain_b;
  p.weight = g.weight;
  p.second = g.out.dtype == DType::f16;
  return p;
}

template <class A, class B, GemmOut kOut>
void run(const GroupedGemm& g, void* stream) {
  using T = GroupedTactic<A, B, kOut>;
  const GroupedProblem p = problem_of(g);
  const int64_t tiles_n = ceil_div(g.n, T::kN);
  const int64_t tiles_m =
      g.weight ? g.groups * ceil_div(g.m, T::kM)
               : slot_count<T::kM>(static_cast<int>(g.a.rows), static_cast<int>(g.groups));
  g.has_blocks()
      ? launch(kOp, grouped_gemm_kernel<T, true>, tiles_m * tiles_n, T::kThreads, stream, p)
      : launch(kOp, grouped_gemm_kernel<T, false>, tiles_m * tiles_n, T::kThreads, stream, p);
}

template <class A, class B>
void run_formats(const GroupedGemm& g, void* stream) {
  g.out.dtype == DType::f32 ? run<A, B, GemmOut::f32>(g, stream)
                            : run<A, B, GemmOut::half>(g, stream);
}

void check(const GroupedGemm& g) {
  const auto fine = [](Grain grain) { return grain == Grain::block || grain == Grain::tile; };
  QUAVER_CHECK(fine(g.grain_a) == fine(g.grain_b), kOp,
               ": blocks of one operand go with blocks or tiles of the other on CUDA");
  QUAVER_CHECK(g.grain_a != Grain::tile, kOp, ": a has tiles, which only b may have on CUDA");
  QUAVER_CHECK(is_aligned(g.a.data) && is_aligned(g.b.data), kOp,
               ": a and b must start at multiples of 16 bytes");
  for (const int64_t size : {g.a.rows, g.b.rows, g.a.cols, g.n, g.m})
    QUAVER_CHECK(size <= kGemmMaxSize, kOp, ": sizes reach ", kGemmMaxSize, ", got ", size);
  QUAVER_CHECK(!is_fp8(g.out.dtype), kOp, ": out must be bf16, f16 or f32, got ",
               name_of(g.out.dtype));
}

}  // namespace

void grouped_gemm(const GroupedGemm& g, void* stream) {
  check(g);
  if (g.out.numel() == 0) return;
  const bool a = g.a.dtype == DType::e4m3, b = g.b.dtype == DType::e4m3;
  QUAVER_CHECK(a || b, kOp, ": e5m2 x e5m2 has no CUDA kernel");
  if (a && b) return run_formats<e4m3, e4m3>(g, stream);
  a ? run_formats<e4m3, e5m2>(g, stream) : run_formats<e5m2, e4m3>(g, stream);
}

}  // namespace quaver::cuda
