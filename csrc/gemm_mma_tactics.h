// The matrix-product kernels of mma.sync (csrc/cuda/gemm_mma.h), for every GPU from sm_89 on: of
// those that are not Hopper's all products with scales of tensors or rows, of Hopper's those whose
// pointers or widths TMA refuses. The order breaks ties of the chooser.
//
// The tiles are what fits into 48 KB of shared memory and 255 registers a thread, which all of
// these GPUs have. Every kernel whose output is not FP8 can add to it. Formats and sums are those
// of csrc/gemm_tactics.h; `bytes` serves any address and width, by a byte at a time.
#pragma once

// clang-format off
// name, a, b, out, sums, tile m, tile n, copies
#define QUAVER_GEMM_MMA_TACTICS(X) \
  X(mma_e4m3_e4m3_fast_half_128x128, e4m3, e4m3, half, kFast, 128, 128, vectors) \
  X(mma_e4m3_e4m3_fast_half_64x64, e4m3, e4m3, half, kFast, 64, 64, vectors) \
  X(mma_e4m3_e4m3_fast_f32_128x128, e4m3, e4m3, f32, kFast, 128, 128, vectors) \
  X(mma_e4m3_e4m3_fast_fp8_128x128, e4m3, e4m3, fp8, kFast, 128, 128, vectors) \
  X(mma_e5m2_e4m3_fast_half_128x128, e5m2, e4m3, half, kFast, 128, 128, vectors) \
  X(mma_e4m3_e4m3_half_128x128, e4m3, e4m3, half, kPromoted, 128, 128, vectors) \
  X(mma_e4m3_e4m3_half_64x64, e4m3, e4m3, half, kPromoted, 64, 64, vectors) \
  X(mma_e4m3_e4m3_f32_128x128, e4m3, e4m3, f32, kPromoted, 128, 128, vectors) \
  X(mma_e4m3_e4m3_f32_64x64, e4m3, e4m3, f32, kPromoted, 64, 64, vectors) \
  X(mma_e4m3_e4m3_fp8_128x128, e4m3, e4m3, fp8, kPromoted, 128, 128, vectors) \
  X(mma_e4m3_e4m3_fp8_64x64, e4m3, e4m3, fp8, kPromoted, 64, 64, vectors) \
  X(mma_e5m2_e4m3_half_128x128, e5m2, e4m3, half, kPromoted, 128, 128, vectors) \
  X(mma_e5m2_e4m3_half_64x64, e5m2, e4m3, half, kPromoted, 64, 64, vectors) \
  X(mma_e5m2_e4m3_f32_128x128, e5m2, e4m3, f32, kPromoted, 128, 128, vectors) \
  X(mma_e5m2_e4m3_f32_64x64, e5m2, e4m3, f32, kPromoted, 64, 64, vectors) \
  X(mma_e5m2_e4m3_fp8_128x128, e5m2, e4m3, fp8, kPromoted, 128, 128, vectors) \
  X(mma_e5m2_e4m3_fp8_64x64, e5m2, e4m3, fp8, kPromoted, 64, 64, vectors) \
  X(mma_e4m3_e5m2_half_128x128, e4m3, e5m2, half, kPromoted, 128, 128, vectors) \
  X(mma_e4m3_e5m2_half_64x64, e4m3, e5m2, half, kPromoted, 64, 64, vectors) \
  X(mma_e4m3_e5m2_f32_128x128, e4m3, e5m2, f32, kPromoted, 128, 128, vectors) \
  X(mma_e4m3_e5m2_f32_64x64, e4m3, e5m2, f32, kPromoted, 64, 64, vectors) \
  X(mma_e4m3_e4m3_half_64x64_bytes, e4m3, e4m3, half, kPromoted, 64, 64, bytes) \
  X(mma_e4m3_e4m3_f32_64x64_bytes, e4m3, e4m3, f32, kPromoted, 64, 64, bytes) \
  X(mma_e4m3_e4m3_fp8_64x64_bytes, e4m3, e4m3, fp8, kPromoted, 64, 64, bytes) \
  X(mma_e5m2_e4m3_half_64x64_bytes, e5m2, e4m3, half, kPromoted, 64, 64, bytes) \
  X(mma_e5m2_e4m3_f32_64x64_bytes, e5m2, e4m3, f32, kPromoted, 64, 64, bytes) \
  X(mma_e5m2_e4m3_fp8_64x64_bytes, e5m2, e4m3, fp8, kPromoted, 64, 64, bytes) \
  X(mma_e4m3_e5m2_half_64x64_bytes, e4m3, e5m2, half, kPromoted, 64, 64, bytes) \
  X(mma_e4m3_e5m2_f32_64x64_bytes, e4m3, e5m2, f32, kPromoted, 64, 64, bytes)
// clang-format on
