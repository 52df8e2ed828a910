// The matrix-product kernels that are compiled for sm_90a, each in a translation unit of its own
// that cmake/cuda.cmake writes from its row here. The order breaks ties of the chooser.
//
// The tiles are those that CUTLASS 4.2 compiles without a spill. A tile of 128 x 256 does not fit
// into one warpgroup (pingpong), and with promoted sums it has a main loop of its own
// (cuda/gemm_halves_sm90.h), beside which the registers do not suffice for an addend.
// The operand formats are the pairs that layers need: weights and activations are e4m3, gradients
// e5m2, and a gradient is the first operand of both backward products. e4m3 x e5m2 serves callers
// with the other order. Fast kernels of two-byte outputs take no addend, which leaves them more
// shared memory. Where no fast kernel exists, a promoted one serves requests that permit fast sums.
// Scales of blocks are e4m3's alone: recipes give them no other operand.
#pragma once

// clang-format off
// name, a, b, out, sums, addend, scales, tile m, tile n, cluster m, cluster n, schedule, scheduler
#define QUAVER_GEMM_TACTICS(X) \
  X(e4m3_e4m3_fast_half_128x256, e4m3, e4m3, half, kFast, kPlain, outer, 128, 256, 2, 1, cooperative, persistent) \
  X(e4m3_e4m3_fast_half_128x128, e4m3, e4m3, half, kFast, kPlain, outer, 128, 128, 2, 1, pingpong, persistent) \
  X(e4m3_e4m3_fast_half_64x256, e4m3, e4m3, half, kFast, kPlain, outer, 64, 256, 1, 1, pingpong, persistent) \
  X(e4m3_e4m3_fast_half_64x128, e4m3, e4m3, half, kFast, kPlain, outer, 64, 128, 1, 1, pingpong, persistent) \
  X(e4m3_e4m3_fast_half_128x256_stream_k, e4m3, e4m3, half, kFast, kPlain, outer, 128, 256, 2, 1, cooperative, stream_k) \
  X(e4m3_e4m3_half_128x256, e4m3, e4m3, half, kPromoted, kPlain, outer, 128, 256, 2, 1, cooperative, persistent) \
  X(e4m3_e4m3_half_128x128, e4m3, e4m3, half, kPromoted, kSource, outer, 128, 128, 2, 1, cooperative, persistent) \
  X(e4m3_e4m3_fast_f32_128x256, e4m3, e4m3, f32, kFast, kSource, outer, 128, 256, 2, 1, cooperative, persistent) \
  X(e4m3_e4m3_f32_128x128, e4m3, e4m3, f32, kPromoted, kSource, outer, 128, 128, 2, 1, cooperative, persistent) \
  X(e4m3_e4m3_fast_fp8_128x256, e4m3, e4m3, fp8, kFast, kPlain, outer, 128, 256, 2, 1, cooperative, persistent) \
  X(e4m3_e4m3_fp8_128x128, e4m3, e4m3, fp8, kPromoted, kPlain, outer, 128, 128, 2, 1, cooperative, persistent) \
  X(e5m2_e4m3_fast_half_128x256, e5m2, e4m3, half, kFast, kPlain, outer, 128, 256, 2, 1, cooperative, persistent) \
  X(e5m2_e4m3_half_128x256, e5m2, e4m3, half, kPromoted, kPlain, outer, 128, 256, 2, 1, cooperative, persistent) \
  X(e5m2_e4m3_half_128x128, e5m2, e4m3, half, kPromoted, kSource, outer, 128, 128, 2, 1, cooperative, persistent) \
  X(e5m2_e4m3_half_128x128_stream_k, e5m2, e4m3, half, kPromoted, kSource, outer, 128, 128, 2, 1, cooperative, stream_k) \
  X(e5m2_e4m3_half_64x128, e5m2, e4m3, half, kPromoted, kSource, outer, 64, 128, 1, 1, pingpong, persistent) \
  X(e5m2_e4m3_f32_128x256, e5m2, e4m3, f32, kPromoted, kPlain, outer, 128, 256, 2, 1, cooperative, persistent) \
  X(e5m2_e4m3_f32_128x128, e5m2, e4m3, f32, kPromoted, kSource, outer, 128, 128, 2, 1, cooperative, persistent) \
  X(e5m2_e4m3_f32_128x128_stream_k, e5m2, e4m3, f32, kPromoted, kSource, outer, 128, 128, 2, 1, cooperative, stream_k) \
  X(e5m2_e4m3_fp8_128x128, e5m2, e4m3, fp8, kPromoted, kPlain, outer, 128, 128, 2, 1, cooperative, persistent) \
  X(e4m3_e5m2_half_128x128, e4m3, e5m2, half, kPromoted, kSource, outer, 128, 128, 2, 1, cooperative, persistent) \
  X(e4m3_e5m2_f32_128x128, e4m3, e5m2, f32, kPromoted, kSource, outer, 128, 128, 2, 1, cooperative, persistent) \
  X(e4m3_e4m3_tiles_half_128x128, e4m3, e4m3, half, kPromoted, kSource, tiles, 128, 128, 2, 1, cooperative, persistent) \
  X(e4m3_e4m3_tiles_f32_128x128, e4m3, e4m3, f32, kPromoted, kSource, tiles, 128, 128, 2, 1, cooperative, persistent) \
  X(e4m3_e4m3_blocks_half_128x128, e4m3, e4m3, half, kPromoted, kSource, blocks, 128, 128, 2, 1, cooperative, persistent) \
  X(e4m3_e4m3_blocks_f32_128x128, e4m3, e4m3, f32, kPromoted, kSource, blocks, 128, 128, 2, 1, cooperative, persistent)
// clang-format on
