// The matrix product of GPUs from sm_89 on, by mma.sync: a block of threads has one tile of the
// output, its warps parts of 32 columns, and the operands come in steps of 64 bytes of K through
// some stages of shared memory. (NVIDIA CUTLASS 4.2, examples/cute/tutorial/sgemm_sm80.cu, has this
// form.) It needs none of CUTLASS's headers, compiles in seconds, and runs on the host too.
//
// A tensor core's FP8 sums keep some 14 bits on sm_89 and sm_90 (arXiv 2411.10958, section 3.2;
// 2412.19437, section 3.5.2), so promoted sums start anew in f32 each 128 of K.
#pragma once

#include "gemm_finish.h"
#include "mma.h"
#include "quaver/gemm.h"
#include "runs.h"

namespace quaver::cuda {

constexpr bool kFast = true, kPromoted = false;

// sm_90 and sm_100 have FP8 products in wgmma and tcgen05 alone: of mma.sync ptxas makes f16
// products of codes that it unpacks, which takes registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
constexpr int kUnrolledHalves = 1;
#else
constexpr int kUnrolledHalves = 2;
#endif

struct MmaProblem {
  const uint8_t *a, *b;
  void* out;
  const float *scale_a, *scale_b, *bias, *out_scale;
  uint32_t* amax;
  int m, n, k;
  int band;  // tiles in M that follow each other before the next column of tiles
  bool rows_a, rows_b, accumulate;
  bool second;  // the format of its size that is not bf16 or e4m3: f16 or e5m2
};

// What the kernel is compiled for.
template <class A_, class B_, GemmOut kOut_, bool kFast_, int kM_, int kN_, bool kVectors_>
struct MmaTactic {
  using A = A_;
  using B = B_;
  static constexpr GemmOut kOut = kOut_;
  static constexpr bool kFast = kFast_, kVectors = kVectors_;
  static constexpr int kM = kM_, kN = kN_;
  static constexpr int kStep = 64;  // bytes of K in a stage
  static constexpr int kRowsOfWarp = kM / 2, kColsOfWarp = 32;
  static constexpr int kWarpsN = kN / kColsOfWarp;
  static constexpr int kThreads = 2 * kWarpsN * kWarp;
  static constexpr int kTiles = kRowsOfWarp / 16;  // of 16 rows, of a warp
  static constexpr int kGroups = kColsOfWarp / 8;  // of 8 columns, of a warp
  static constexpr int kStageBytes = (kM + kN) * kStep;
  static constexpr int kUnrolledTurns = kVectors ? 2 : 1;  // those of single bytes take registers
  static constexpr int kStages = kM * kN > 64 * 64 ? 3 : 4;
};

// Chunk `chunk` of 16 bytes of a row in a stage. The rows that ldmatrix reads at once, eight that
// follow each other in `a` and, of `b`, the pairs of each lane's columns, lie in different banks.
QUAVER_DEVICE int chunk_of_a(int row, int chunk) { return row * 4 + (chunk ^ row / 2 % 4); }
QUAVER_DEVICE int chunk_of_b(int row, int chunk) { return row * 4 + (chunk ^ row / 8 % 4); }

// The column of a warp's 32 that is column `c` of its group of 8: a lane's columns of four groups,
// 2 (lane % 4) and the next, are then eight in a row, which it stores at once.
QUAVER_DEVICE int column_of(int group, int c) { return c / 2 * 8 + group * 2 + c % 2; }

// 16 bytes of a row from k on, with zeros outside of the matrix.
template <bool kVectors>
QUAVER_DEVICE void copy_chunk(uint4* to, const uint8_t* from, int row, int rows, int k, int width) {
  const bool inside = row < rows && k < width;
  const uint8_t* at = from + (inside ? int64_t(row) * width + k : 0);
  if constexpr (kVectors) {
    copy_async(to, at, inside);
  } else {
#pragma unroll 1  // for fewer registers
    for (int i = 0; i < kCopyBytes; i += 4) {
      uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (inside && k + i + j < width) word |= uint32_t(at[i + j]) << j * 8;
      reinterpret_cast<uint32_t*>(to)[i / 4] = word;
    }
  }
}

// Starts the copies of a step of K of kRows rows to a stage; place(row, chunk) is where they go.
template <class T, int kRows, class Place>
QUAVER_DEVICE void copy_rows(const uint8_t* from, uint4* stage, int first, int rows, int k,
                             int width, Place place) {
  constexpr int kTurns = kRows * 4 / T::kThreads;
  static_assert(kTurns * T::kThreads == kRows * 4, "whole turns");
#pragma unroll T::kUnrolledTurns
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = turn * T::kThreads + threadIdx.x, row = i / 4, chunk = i % 4;
    copy_chunk<T::kVectors>(stage + place(row, chunk), from, first + row, rows,
                            k + chunk * kCopyBytes, width);
  }
}

template <class T>
QUAVER_DEVICE void copy_step(const MmaProblem& p, uint4* stage, int first_m, int first_n, int k) {
  copy_rows<T, T::kM>(p.a, stage, first_m, p.m, k, p.k, chunk_of_a);
  copy_rows<T, T::kN>(p.b, stage + T::kM * 4, first_n, p.n, k, p.k, chunk_of_b);
}

template <class T>
using Sums = float[T::kTiles][T::kGroups][4];

// Adds the products of a stage.
template <class T>
QUAVER_DEVICE void multiply_stage(const uint4* stage, int row, int col, Sums<T>& sums) {
  const int lane = threadIdx.x % kWarp, of_tile = lane % 8, tile = lane / 8;
#pragma unroll kUnrolledHalves
  for (int half = 0; half < 2; ++half) {  // of 32 bytes
    uint32_t b[T::kGroups / 2][4];
#pragma unroll
    for (int pair = 0; pair < T::kGroups / 2; ++pair)
      load_tiles(b[pair], stage + T::kM * 4 +
                              chunk_of_b(col + column_of(2 * pair + tile / 2, of_tile),
                                         2 * half + tile % 2));
#pragma unroll
    for (int i = 0; i < T::kTiles; ++i) {
      uint32_t a[4];
      load_tiles(a, stage + chunk_of_a(row + 16 * i + tile % 2 * 8 + of_tile, 2 * half + tile / 2));
#pragma unroll
      for (int j = 0; j < T::kGroups; ++j)
        multiply_tiles(typename T::A{}, typename T::B{}, sums[i][j], a, b[j / 2][j % 2 * 2],
                       b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

template <class T>
QUAVER_DEVICE void move_sums(Sums<T>& totals, Sums<T>& sums) {
#pragma unroll
  for (int i = 0; i < T::kTiles; ++i)
#pragma unroll
    for (int j = 0; j < T::kGroups; ++j)
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        totals[i][j][s] += sums[i][j][s];
        sums[i][j][s] = 0.0f;
      }
}

// The sums of a warp's part of the tile, over all of K.
template <class T>
QUAVER_DEVICE void multiply_all(const MmaProblem& p, uint4* stages, int first_m, int first_n,
                                int row, int col, Sums<T>& totals) {
  constexpr int kChunks = T::kStageBytes / kCopyBytes;
  const int steps = p.k / T::kStep + (p.k % T::kStep != 0);
  Sums<T> sums = {};
#pragma unroll
  for (int s = 0; s < T::kStages - 1; ++s) {
    if (s < steps) copy_step<T>(p, stages + s * kChunks, first_m, first_n, s * T::kStep);
    commit_copies();
  }
  int stage = 0, next = T::kStages - 1;
  for (int step = 0; step < steps; ++step) {
    wait_copies<T::kStages - 2>();
    __syncthreads();  // the stage's bytes are there, and nobody reads those of the step before
    if (step + T::kStages - 1 < steps)
      copy_step<T>(p, stages + next * kChunks, first_m, first_n,
                   (step + T::kStages - 1) * T::kStep);
    commit_copies();
    multiply_stage<T>(stages + stage * kChunks, row, col, T::kFast ? totals : sums);
    if (!T::kFast && (step % (kGemmTileK / T::kStep) != 0 || step + 1 == steps))
      move_sums<T>(totals, sums);
    stage = stage + 1 == T::kStages ? 0 : stage + 1;
    next = next + 1 == T::kStages ? 0 : next + 1;
  }
}

constexpr int kRunOfLane = 8;  // columns in a row

// Adds the values of `out` at i.. to x, of which n exist.
template <class X>
QUAVER_DEVICE void add_source(const X* out, int n, bool whole, float (&x)[kRunOfLane]) {
  constexpr int kWords = kRunOfLane * int(sizeof(X)) / 4, per_word = 4 / int(sizeof(X));
  uint32_t word[kWords] = {};
  if (whole) {
    load_words<kWords>(out, word);
  } else {
#pragma unroll
    for (int i = 0; i < kRunOfLane; ++i)
      if (i < n)
        word[i / per_word] |= uint32_t(reinterpret_cast<const Bits<X>*>(out)[i])
                              << i % per_word * (32 / per_word);
  }
  float source[kRunOfLane];
#pragma unroll
  for (int w = 0; w < kWords; ++w) decode_word(X{}, word[w], source + w * per_word);
#pragma unroll
  for (int i = 0; i < kRunOfLane; ++i) x[i] += source[i];
}

template <class X>
QUAVER_DEVICE void store_run(X* out, int n, bool whole, const float (&x)[kRunOfLane]) {
  constexpr int kWords = kRunOfLane * int(sizeof(X)) / 4, per_word = 4 / int(sizeof(X));
  uint32_t word[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) word[w] = convert_word<X>(x + w * per_word);
  if (whole) return store_words<kWords>(out, word);
#pragma unroll
  for (int i = 0; i < kRunOfLane; ++i)
    if (i < n)
      reinterpret_cast<Bits<X>*>(out)[i] =
          static_cast<Bits<X>>(word[i / per_word] >> i % per_word * (32 / per_word));
}

// Eight values of a row of the output, of which n exist.
template <class X>
QUAVER_DEVICE void finish_run(const MmaProblem& p, int64_t at, int n, bool whole,
                              float (&x)[kRunOfLane]) {
  X* out = static_cast<X*>(p.out) + at;
  if constexpr (sizeof(X) > 1)
    if (p.accumulate) add_source(out, n, whole, x);
  store_run(out, n, whole, x);
}

// Writes a warp's part of the tile.
template <class T>
QUAVER_DEVICE void finish_tile(const MmaProblem& p, int first_row, int first_col,
                               const Sums<T>& sums) {
  const int lane = threadIdx.x % kWarp, col = first_col + lane % 4 * kRunOfLane;
  const int n = p.n - col < kRunOfLane ? p.n - col : kRunOfLane;
  const bool whole = T::kVectors && n == kRunOfLane;
  float scale_b[kRunOfLane], bias[kRunOfLane];
#pragma unroll
  for (int i = 0; i < kRunOfLane; ++i) {
    scale_b[i] = i < n ? p.scale_b[p.rows_b ? col + i : 0] : 0.0f;
    bias[i] = i < n && p.bias != nullptr ? p.bias[col + i] : 0.0f;
  }
  [[maybe_unused]] Divisor by = {1.0f, false, true};
  if constexpr (T::kOut == GemmOut::fp8) by = divisor(*p.out_scale);
  [[maybe_unused]] uint32_t seen = 0;  // bits of the largest magnitude
#pragma unroll
  for (int r = 0; r < 2 * T::kTiles; ++r) {
    const int row = first_row + r * 8 + lane / 4;
    if (row >= p.m || n <= 0) continue;
    const float scale_a = p.scale_a[p.rows_a ? row : 0];
    const int64_t at = int64_t(row) * p.n + col;
    float x[kRunOfLane];
#pragma unroll
    for (int i = 0; i < kRunOfLane; ++i)
      x[i] = finish_sum(sums[r / 2][i / 2][r % 2 * 2 + i % 2], scale_a, scale_b[i], bias[i]);
    if constexpr (T::kOut == GemmOut::f32) {
      finish_run<float>(p, at, n, whole, x);
    } else if constexpr (T::kOut == GemmOut::half) {
      p.second ? finish_run<f16>(p, at, n, whole, x) : finish_run<bf16>(p, at, n, whole, x);
    } else {
#pragma unroll
      for (int i = 0; i < kRunOfLane; ++i) {
        if (i < n) seen = max_bits(seen, magnitude_bits(x[i]));
        x[i] = divide_one(x[i], by);
      }
      p.second ? finish_run<e5m2>(p, at, n, whole, x) : finish_run<e4m3>(p, at, n, whole, x);
    }
  }
  if constexpr (T::kOut == GemmOut::fp8) {  // one atomic a warp
    seen = __reduce_max_sync(kAllLanes, seen);
    if (lane == 0 && seen != 0) atomicMax(p.amax, seen);
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) gemm_mma_kernel(MmaProblem p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890  // older ones cannot multiply FP8
  __shared__ uint4 stages[T::kStages * T::kStageBytes / kCopyBytes];
  const int64_t tiles_m = ceil_div(p.m, T::kM), tiles_n = ceil_div(p.n, T::kN);
  const int64_t first = blockIdx.x / (p.band * tiles_n) * p.band;
  const int64_t in_band = blockIdx.x - first * tiles_n;
  const int64_t rows = tiles_m - first < p.band ? tiles_m - first : p.band;
  const int first_m = static_cast<int>((first + in_band % rows) * T::kM);
  const int first_n = static_cast<int>(in_band / rows * T::kN);
  const int warp = threadIdx.x / kWarp;
  const int row = warp / T::kWarpsN * T::kRowsOfWarp, col = warp % T::kWarpsN * T::kColsOfWarp;
  Sums<T> sums = {};
  multiply_all<T>(p, stages, first_m, first_n, row, col, sums);
  finish_tile<T>(p, first_m + row, first_n + col, sums);
#endif
}

}  // namespace quaver::cuda
