// Stage "optimizer": AdamW over all parameters in one call, one pass over each state.
#pragma once

#include "quaver/tensor_view.h"

namespace quaver {

// A stored tensor with its decode scale and the amax of its values; null for f32 and bf16.
struct StateView {
  TensorView values;
  float* scale = nullptr;
  float* amax = nullptr;
};

inline bool is_scaled(const StateView& s) { return scale_max(s.values.dtype) > 0.0f; }

struct AdamParameter {
  StateView weight;      // f32, bf16, or f16 with scale
  StateView exp_avg;     // f32, or e4m3 with scale
  StateView exp_avg_sq;  // f32, or f16 with scale
  TensorView grad;
  const float* grad_scale = nullptr;  // null: 1
  const float* grad_amax = nullptr;   // of the decoded gradient; non-finite skips the whole step
  TensorView fp8, fp8_t;              // e4m3 GEMM copies of an f16 weight, or empty
  float* fp8_scale = nullptr;
  int64_t* step = nullptr;        // counts the steps taken
  const double* hyper = nullptr;  // lr, beta1, beta2, eps, weight_decay
};

namespace cpu {

// If any grad_amax is not finite nothing changes but *skipped, which counts up.
void adam(const AdamParameter* parameters, int64_t count, int64_t* skipped);

}  // namespace cpu

namespace cuda {

// Device memory, 16-byte aligned, that one call needs while it runs.
int64_t adam_workspace_bytes(int64_t count);

// As the CPU's. Everything that decides is on the device, so a captured graph stays right: the
// host reads shapes and pointers only.
void adam(const AdamParameter* parameters, int64_t count, int64_t* skipped, void* workspace,
          void* stream);

}  // namespace cuda
}  // namespace quaver
