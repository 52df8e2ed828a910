// Spans of optimizer states and parameters: the arguments of the vector loops of simd_adam.cpp.
#pragma once

#include <cstdint>

#include "quaver/adam.h"
#include "quaver/codec.h"
#include "quaver/dither.h"
#include "quaver/optimizer.h"

namespace quaver::cpu {

// Values per stack buffer: a few f32 buffers of this size stay in the first-level cache.
constexpr int64_t kBlock = 512;

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
  Remainder remainder;  // of a bf16 weight
  bool stochastic;      // of a 16-bit weight
  bool stochastic_exp_avg;
  Dither dither;
  const float* rates;  // of the whole parameter's subsets, or null
  Subsets subsets;
  int64_t begin;   // of the span in the parameter
  uint64_t first;  // element, of the whole tensor
};

// A gradient of n values, and the sums of its subsets.
struct SubsetSpan {
  const void* grad;
  DType grad_type;
  float grad_scale;
  int64_t n;
  float* sums;
  Subsets subsets;
};

// The same values of every rank's shard: rank r's begin r * stride elements after `first`.
struct ShardSpan {
  const void* first;
  DType type;
  float scale;
  int64_t ranks, stride;
};

// contract() of all 256 codes of a format, signs included, for a scale that holds this power.
const float* expanded_values(DType type, uint32_t power);

}  // namespace quaver::cpu
