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
  // As cast, and amax's result for x.
  uint32_t (*cast_seen)(void* out, DType out_type, const void* x, DType type, int64_t n,
                        float factor, bool divide);
  // out = encode(decode(x) / scale) with the random bits of elements first, first + 1, ...
  void (*cast_stochastic)(void* out, DType out_type, const void* x, DType type, int64_t n,
                          float scale, uint64_t seed, uint64_t first);
  // out[c * out_stride + r] = x[r * stride + c] for r < rows, c < cols. `stream` writes past the
  // cache where lines are whole, for what is too large to be read from it (streams()).
  void (*transpose)(uint8_t* out, int64_t out_stride, const uint8_t* x, int64_t stride,
                    int64_t rows, int64_t cols, bool stream);
  // Sum of squares of decode(x) in f64, in the order of grad.h; amax bits beside it.
  double (*sum_squares)(const void* x, DType type, int64_t n, uint32_t* amax);
  // sum = decode(a) * scale_a + decode(b) * scale_b. Encodes it by 1 / scale into `out` where that
  // is not null; returns its amax bits.
  uint32_t (*add)(void* out, DType out_type, float scale, const void* a, DType a_type,
                  float scale_a, const void* b, DType b_type, float scale_b, int64_t n);
  // Sums n values of each rank's shard, encodes the sum by sum_scale into `out`; returns its amax
  // bits and adds how many codes of an FP8 `out` are at the format's maximum.
  uint32_t (*sum_shards)(void* out, DType out_type, float sum_scale, const ShardSpan& shards,
                         int64_t n, int32_t* at_max);
  // Codes and scales of groups, to nearest, and back.
  void (*encode_groups)(const StateSpan& state, const void* x, DType type, int64_t n);
  void (*decode_groups)(float* out, const StateSpan& state, int64_t n);
  // Sums the squares of subsets begin <= k < end, in the order of subset.h; amax bits of them all.
  uint32_t (*subset_sums)(const SubsetSpan& span, int64_t begin, int64_t end);
  // One AdamW step of n elements; amax bits of the stored weight, exp_avg and exp_avg_sq.
  void (*adam)(const AdamSpan& span, const AdamStep& step, int64_t n, uint32_t amax[3]);
};

const Simd& simd();

// Whether a matrix of codes is so large that whoever reads it next finds little of it in the cache.
inline bool streams(int64_t bytes) { return bytes >= (int64_t(4) << 20); }

}  // namespace quaver::cpu
