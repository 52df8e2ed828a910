// Stage "optimizer": AdamW over all parameters in one call, one pass over each state.
#pragma once

#include "quaver/codec.h"
#include "quaver/subset.h"
#include "quaver/tensor_view.h"

namespace quaver {

// A stored tensor with its decode scale and the amax of its values, or with the scales of its
// groups; null for what has no scale.
struct StateView {
  TensorView values;
  float* scale = nullptr;
  float* amax = nullptr;
  Scaling scaling = Scaling::tensor;
};

// Has one scale, which a step must choose before it begins.
inline bool is_scaled(const StateView& s) {
  return s.scale != nullptr && s.scaling == Scaling::tensor;
}

struct AdamParameter {
  StateView weight;      // f32, bf16 or f16, or f16 with scale
  StateView exp_avg;     // f32, f16 with scale, or FP8 of any scaling; bf16 beside subsets
  StateView exp_avg_sq;  // likewise, or f32 or bf16 with a value for each subset
  Subsets subsets;
  const float* subset_sums = nullptr;  // of this gradient (subset.h), where there are subsets
  TensorView grad;
  const float* grad_scale = nullptr;  // null: 1
  const float* grad_amax = nullptr;   // of the decoded gradient; non-finite skips the whole step
  TensorView fp8, fp8_t;              // e4m3 GEMM copies of an f16 weight, or empty
  float* fp8_scale = nullptr;
  Remainder remainder;      // the low bits of a bf16 weight's f32 master (codec.h)
  bool stochastic = false;  // round a 16-bit weight by dither.h, from seed, step, element
  uint64_t seed = 0;
  int64_t first_element = 0;      // of the weight in the whole tensor, of which it may be a shard
  int64_t* step = nullptr;        // counts the steps taken, 0 <= *step < 2^63 - 1
  const double* hyper = nullptr;  // lr, beta1, beta2, eps, weight_decay
};

// An FP8 first moment rounds with its weight. An expanded one is fine enough for nearest rounding.
inline bool rounds_exp_avg(const AdamParameter& p) {
  return p.stochastic && is_fp8(p.exp_avg.values.dtype) && p.exp_avg.scaling != Scaling::expand;
}

namespace cpu {

// If any grad_amax is not finite nothing changes but *skipped, which counts up.
void adam(const AdamParameter* parameters, int64_t count, int64_t* skipped);

// Conversions of f32, f16 or bf16 values to codes and scales of a state in groups, and back to f32.
// Encoding rounds to nearest, except that only zeros become zero.
void encode_state(const StateView& state, const TensorView& x);
void decode_state(const TensorView& out, const StateView& state);

}  // namespace cpu

namespace cuda {

// Device memory, 16-byte aligned, that one call needs while it runs.
int64_t adam_workspace_bytes(const AdamParameter* parameters, int64_t count);

// The CPU's step on the device. The host reads shapes and pointers only, and every decision is
// taken on the device, so a captured graph stays right.
void adam(const AdamParameter* parameters, int64_t count, int64_t* skipped, void* workspace,
          void* stream);

void encode_state(const StateView& state, const TensorView& x, void* stream);
void decode_state(const TensorView& out, const StateView& state, void* stream);

}  // namespace cuda
}  // namespace quaver
