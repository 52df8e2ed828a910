// The vector loops, one table per instruction set. Spans are contiguous; a loop never looks outside
// of its span. simd.cpp is compiled once per instruction set and isa.cpp chooses.
#pragma once

#include "spans.h"

namespace quaver::cpu {

constexpr int64_t kTile = 64;

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
  // Sum of squares of decode(x) in f64, in the order of grad.h; amax bits beside it.
  double (*sum_squares)(const void* x, DType type, int64_t n, uint32_t* amax);
  // sum = decode(a) * scale_a + decode(b) * scale_b. Encodes it by 1 / scale into `out` where that
  // is not null; returns its amax bits.
  uint32_t (*add)(void* out, DType out_type, float scale, const void* a, DType a_type,
                  float scale_a, const void* b, DType b_type, float scale_b, int64_t n);
  // Codes and scales of groups, to nearest, and back.
  void (*encode_groups)(const StateSpan& state, const void* x, DType type, int64_t n);
  void (*decode_groups)(float* out, const StateSpan& state, int64_t n);
  // Sums the squares of subsets begin <= k < end, in the order of subset.h; amax bits of them all.
  uint32_t (*subset_sums)(const SubsetSpan& span, int64_t begin, int64_t end);
  // One AdamW step of n elements; amax bits of the stored weight, exp_avg and exp_avg_sq.
  void (*adam)(const AdamSpan& span, const AdamStep& step, int64_t n, uint32_t amax[3]);
};

const Simd& simd();

}  // namespace quaver::cpu
