// The vector loops, one table per instruction set. Spans are contiguous; a loop never looks outside
// of its span. simd.cpp is compiled once per instruction set and dispatch.cpp chooses.
#pragma once

#include <cstdint>

#include "quaver/adam.h"
#include "quaver/dtype.h"

namespace quaver::cpu {

// Values per stack buffer: a few f32 buffers of this size stay in the first-level cache.
constexpr int64_t kBlock = 512;
constexpr int64_t kTile = 64;

// One parameter's storage and scales for a span of Adam.
struct AdamSpan {
  void *weight, *exp_avg, *exp_avg_sq;
  const void* grad;
  uint8_t* fp8;  // e4m3 GEMM copy of the span, or null
  DType weight_type, exp_avg_type, exp_avg_sq_type, grad_type;
  float weight_scale, exp_avg_scale, exp_avg_sq_scale, grad_scale;  // decode, as stored
  float new_weight_scale, new_exp_avg_scale, new_exp_avg_sq_scale;  // decode, to be stored
};

struct Simd {
  // Bits of the largest magnitude as a non-negative f32; any NaN gives a NaN.
  uint32_t (*amax)(const void* x, DType type, int64_t n);
  // out = encode(decode(x) * multiplier), or / divisor when `divide`. Nearest, saturating.
  void (*cast)(void* out, DType out_type, const void* x, DType type, int64_t n, float factor,
               bool divide);
  // out = encode(decode(x) / scale) with the random bits of elements first, first + 1, ...
  void (*cast_stochastic)(void* out, DType out_type, const void* x, DType type, int64_t n,
                          float scale, uint64_t seed, uint64_t first);
  // out[c * out_stride + r] = x[r * stride + c] for r < rows, c < cols <= kTile, rows <= kTile.
  void (*transpose)(uint8_t* out, int64_t out_stride, const uint8_t* x, int64_t stride,
                    int64_t rows, int64_t cols);
  // Sum of squares of decode(x) in f64, in the order of norm.h; amax bits beside it.
  double (*sum_squares)(const void* x, DType type, int64_t n, uint32_t* amax);
  // sum = decode(a) * scale_a + decode(b) * scale_b. Encodes it by 1 / scale into `out` where that
  // is not null; returns its amax bits.
  uint32_t (*add)(void* out, DType out_type, float scale, const void* a, DType a_type,
                  float scale_a, const void* b, DType b_type, float scale_b, int64_t n);
  // One AdamW step of n elements; amax bits of the stored weight, exp_avg and exp_avg_sq.
  void (*adam)(const AdamSpan& span, const AdamStep& step, int64_t n, uint32_t amax[3]);
};

const Simd& simd();

}  // namespace quaver::cpu
