// The products of a mixture's experts by mma.sync, in one launch (quaver/groups.h): a block of
// threads finds its group, whose rows or columns it alone multiplies, from the ends on the device.
// The grid has a tile for any division of the rows; blocks without one leave.
//
// The tile, its stages and its instructions are those of gemm_mma.h. Scales of blocks multiply the
// partial sum of each 128 of K (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
#pragma once

#include "gemm_mma.h"
#include "groups.h"

namespace quaver::cuda {

template <class A, class B, GemmOut kOut>
using GroupedTactic = MmaTactic<A, B, kOut, kPromoted, 64, 64, true>;

struct GroupedProblem {
  const uint8_t *a, *b;
  void* out;
  const float *scale_a, *scale_b;
  Groups of;
  int m, n;            // rows and columns of out, or of each of its matrices
  int rows_a, rows_b;  // of a, of each matrix of b, both padded where they are transposed copies
  int k;               // the width of a and b
  int per_row_a, per_row_b;  // scales
  Grain grain_a, grain_b;
  bool weight;
  bool second;  // f16, not bf16
};

// The product of one block of threads.
struct GroupedPart {
  const uint8_t *a, *b;
  const float *scale_a, *scale_b;
  int64_t out;     // the element where row 0 begins
  int rows, cols;  // ends
  int first_m, first_n;
  int k;      // what is multiplied of the width
  bool none;  // rows of no group, which are zero
};

// The scales of a group: `rows` of a matrix of its own each, or, of blocks, those behind `block`.
QUAVER_DEVICE const float* scales_of(const float* scale, Grain grain, int group, int64_t rows,
                                     int block) {
  if (grain == Grain::tensor) return scale + group;
  return scale + (grain == Grain::row ? group * rows : block);
}

template <class T>
QUAVER_DEVICE GroupedPart rows_part(const GroupedProblem& p) {
  const int slots = slot_count<T::kM>(p.rows_a, p.of.count);
  const int slot = static_cast<int>(blockIdx.x) % slots;
  const int group = group_of<T::kM>(p.of, slot), begin = first_row(p.of, group);
  GroupedPart part = {};
  part.none = group == p.of.count;
  part.rows = part.none ? p.rows_a : end_of(p.of, group);
  part.first_m = begin + (slot - first_slot<T::kM>(p.of, group)) * T::kM;
  part.first_n = static_cast<int>(blockIdx.x) / slots * T::kN;
  part.cols = p.n;
  part.k = part.none ? 0 : p.k;
  const int own = part.none ? 0 : group;
  part.a = p.a;
  part.b = p.b + int64_t(own) * p.rows_b * p.k;
  part.scale_a = p.grain_a == Grain::tensor ? p.scale_a + own : p.scale_a;
  const int of_matrix = p.grain_b == Grain::tile ? static_cast<int>(ceil_div(p.rows_b, 128)) : 1;
  part.scale_b = p.grain_b == Grain::tile ? p.scale_b + int64_t(own) * of_matrix * p.per_row_b
                                          : scales_of(p.scale_b, p.grain_b, own, p.rows_b, 0);
  return part;
}

template <class T>
QUAVER_DEVICE GroupedPart weight_part(const GroupedProblem& p) {
  const int tiles_m = (p.m + T::kM - 1) / T::kM, tiles_n = (p.n + T::kN - 1) / T::kN;
  const int group = static_cast<int>(blockIdx.x) / (tiles_m * tiles_n);
  const int tile = static_cast<int>(blockIdx.x) - group * tiles_m * tiles_n;
  const int begin = first_row(p.of, group), rows = end_of(p.of, group) - begin;
  const int column = static_cast<int>(group_column(begin, group));
  const int block = static_cast<int>(group_block(begin, group));
  GroupedPart part = {};
  part.a = p.a + column;
  part.b = p.b + column;
  part.scale_a = scales_of(p.scale_a, p.grain_a, group, p.rows_a, block);
  part.scale_b = scales_of(p.scale_b, p.grain_b, group, p.rows_b, block);
  part.out = int64_t(group) * p.m * p.n;
  part.rows = p.m;
  part.cols = p.n;
  part.first_m = tile / tiles_n * T::kM;
  part.first_n = tile % tiles_n * T::kN;
  part.k = rows < 0 ? 0 : (rows + 15) / 16 * 16;  // the columns up to there are zeros
  return part;
}

// Starts the copies of a step of K of kRows rows, of which those below `rows` exist.
template <class T, int kRows, class Place>
QUAVER_DEVICE void copy_part(const uint8_t* from, uint4* stage, int first, int rows, int k,
                             int most, int width, Place place) {
  constexpr int kTurns = kRows * 4 / T::kThreads;
  static_assert(kTurns * T::kThreads == kRows * 4, "whole turns");
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = turn * T::kThreads + threadIdx.x, chunk = i % 4;
    const int row = first + i / 4, at = k + chunk * kCopyBytes;
    const bool inside = row < rows && at < most;
    copy_async(stage + place(i / 4, chunk), from + (inside ? int64_t(row) * width + at : 0),
               inside);
  }
}

template <class T>
QUAVER_DEVICE void copy_step(const GroupedProblem& p, const GroupedPart& part, uint4* stage,
                             int k) {
  copy_part<T, T::kM>(part.a, stage, part.first_m, part.rows, k, part.k, p.k, chunk_of_a);
  copy_part<T, T::kN>(part.b, stage + T::kM * 4, part.first_n, part.cols, k, part.k, p.k,
                      chunk_of_b);
}

// Adds the sums of 128 of K under the scales of their blocks.
template <class T>
QUAVER_DEVICE void scale_sums(const GroupedProblem& p, const GroupedPart& part, int block, int row,
                              int col, Sums<T>& totals, Sums<T>& sums) {
  const int lane = threadIdx.x % kWarp, first = part.first_n + col + lane % 4 * kRunOfLane;
  const int shift = p.grain_b == Grain::tile ? 7 : 0;
  float scale_b[kRunOfLane];
#pragma unroll
  for (int i = 0; i < kRunOfLane; ++i)
    scale_b[i] = first + i < part.cols
                     ? part.scale_b[int64_t((first + i) >> shift) * p.per_row_b + block]
                     : 0.0f;
#pragma unroll
  for (int r = 0; r < 2 * T::kTiles; ++r) {
    const int at = part.first_m + row + r * 8 + lane / 4;
    const float scale_a = at < part.rows ? part.scale_a[int64_t(at) * p.per_row_a + block] : 0.0f;
#pragma unroll
    for (int i = 0; i < kRunOfLane; ++i) {
      float& sum = sums[r / 2][i / 2][r % 2 * 2 + i % 2];
      totals[r / 2][i / 2][r % 2 * 2 + i % 2] += sum * (scale_a * scale_b[i]);
      sum = 0.0f;
    }
  }
}

// The sums of a warp's part of the tile, over all of the group's K.
template <class T, bool kBlocks>
QUAVER_DEVICE void multiply_part(const GroupedProblem& p, const GroupedPart& part, uint4* stages,
                                 int row, int col, Sums<T>& totals) {
  constexpr int kChunks = T::kStageBytes / kCopyBytes;
  const int steps = (part.k + T::kStep - 1) / T::kStep;
  Sums<T> sums = {};
#pragma unroll
  for (int s = 0; s < T::kStages - 1; ++s) {
    if (s < steps) copy_step<T>(p, part, stages + s * kChunks, s * T::kStep);
    commit_copies();
  }
  int stage = 0, next = T::kStages - 1;
  for (int step = 0; step < steps; ++step) {
    wait_copies<T::kStages - 2>();
    __syncthreads();  // the stage's bytes are there, and nobody reads those of the step before
    if (step + T::kStages - 1 < steps)
      copy_step<T>(p, part, stages + next * kChunks, (step + T::kStages - 1) * T::kStep);
    commit_copies();
    multiply_stage<T>(stages + stage * kChunks, row, col, sums);
    if (step % (kGemmTileK / T::kStep) != 0 || step + 1 == steps) {
      if constexpr (kBlocks)
        scale_sums<T>(p, part, step / (kGemmTileK / T::kStep), row, col, totals, sums);
      else
        move_sums<T>(totals, sums);
    }
    stage = stage + 1 == T::kStages ? 0 : stage + 1;
    next = next + 1 == T::kStages ? 0 : next + 1;
  }
}

// Writes a warp's part of the tile.
template <class T, bool kBlocks>
QUAVER_DEVICE void finish_part(const GroupedProblem& p, const GroupedPart& part, int row, int col,
                               const Sums<T>& sums) {
  const int lane = threadIdx.x % kWarp, first = part.first_n + col + lane % 4 * kRunOfLane;
  const int n = part.cols - first < kRunOfLane ? part.cols - first : kRunOfLane;
  const bool whole = n == kRunOfLane && p.n % kRunOfLane == 0;
  float scale_b[kRunOfLane];
#pragma unroll
  for (int i = 0; i < kRunOfLane; ++i)
    scale_b[i] = kBlocks || i >= n ? 1.0f : part.scale_b[p.grain_b == Grain::row ? first + i : 0];
#pragma unroll
  for (int r = 0; r < 2 * T::kTiles; ++r) {
    const int at = part.first_m + row + r * 8 + lane / 4;
    if (at >= part.rows || n <= 0) continue;
    const float scale_a = kBlocks ? 1.0f : part.scale_a[p.grain_a == Grain::row ? at : 0];
    float x[kRunOfLane];
#pragma unroll
    for (int i = 0; i < kRunOfLane; ++i) {
      const float sum = sums[r / 2][i / 2][r % 2 * 2 + i % 2];
      x[i] = part.none ? 0.0f : kBlocks ? sum : finish_sum(sum, scale_a, scale_b[i], 0.0f);
    }
    const int64_t place = part.out + int64_t(at) * p.n + first;
    if constexpr (T::kOut == GemmOut::f32)
      store_run(static_cast<float*>(p.out) + place, n, whole, x);
    else if (p.second)
      store_run(static_cast<f16*>(p.out) + place, n, whole, x);
    else
      store_run(static_cast<bf16*>(p.out) + place, n, whole, x);
  }
}

template <class T, bool kBlocks>
__global__ void __launch_bounds__(T::kThreads, 1) grouped_gemm_kernel(GroupedProblem p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890  // older ones cannot multiply FP8
  __shared__ uint4 stages[T::kStages * T::kStageBytes / kCopyBytes];
  const GroupedPart part = p.weight ? weight_part<T>(p) : rows_part<T>(p);
  if (part.first_m >= part.rows) return;
  const int warp = threadIdx.x / kWarp;
  const int row = warp / T::kWarpsN * T::kRowsOfWarp, col = warp % T::kWarpsN * T::kColsOfWarp;
  Sums<T> sums = {};
  multiply_part<T, kBlocks>(p, part, stages, row, col, sums);
  finish_part<T, kBlocks>(p, part, row, col, sums);
#endif
}

}  // namespace quaver::cuda
