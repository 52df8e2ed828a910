// The vector loops, one table per instruction set. Spans are contiguous; a loop never looks outside
// of its span. simd.cpp is compiled once per instruction set and isa.cpp chooses.
#pragma once

#include <cstdint>

#include "quaver/adam.h"
#include "quaver/codec.h"

namespace quaver::cpu {

// Values per stack buffer: a few f32 buffers of this size stay in the first-level cache.
constexpr int64_t kBlock = 512;
constexpr int64_t kTile = 64;

// One state of a span of Adam. A span begins with a group.
struct StateSpan {
  void* values;
  DType type;
  Scaling scaling;
  float scale, new_scale;  // decode, of the whole tensor, as stored and to be stored
  float* scales;           // or of each group
};

// One parameter's storage and scales for a span of Adam.
struct AdamSpan {
  StateSpan weight, exp_avg, exp_avg_sq;
  const void* grad;
  DType grad_type;
  float grad_scale;
  uint8_t* fp8;         // e4m3 GEMM copy of the span, or null
  uint16_t* remainder;  // of a bf16 weight, or null
  bool stochastic;      // of a 16-bit weight
  bool stochastic_exp_avg;
  uint64_t seed, offset, first;  // Philox: of the weight, the step, the first element
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
  // Sum of squares of decode(x) in f64, in the order of grad.h; amax bits beside it.
  double (*sum_squares)(const void* x, DType type, int64_t n, uint32_t* amax);
  // sum = decode(a) * scale_a + decode(b) * scale_b. Encodes it by 1 / scale into `out` where that
  // is not null; returns its amax bits.
  uint32_t (*add)(void* out, DType out_type, float scale, const void* a, DType a_type,
                  float scale_a, const void* b, DType b_type, float scale_b, int64_t n);
  // Codes and scales of groups, to nearest, and back.
  void (*encode_groups)(const StateSpan& state, const void* x, DType type, int64_t n);
  void (*decode_groups)(float* out, const StateSpan& state, int64_t n);
  // One AdamW step of n elements; amax bits of the stored weight, exp_avg and exp_avg_sq.
  void (*adam)(const AdamSpan& span, const AdamStep& step, int64_t n, uint32_t amax[3]);
};

const Simd& simd();

// contract() of all 256 codes of a format, signs included, for a scale that holds this power.
const float* expanded_values(DType type, uint32_t power);

}  // namespace quaver::cpu
