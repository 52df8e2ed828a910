// Stage "gradient": norm, finite check and FP8 accumulation.
#pragma once

#include "quaver/tensor_view.h"

namespace quaver::cpu {

// One gradient, its decode scale (null: 1) and the amax seen when it was encoded (null: its own).
// FP8 saturates infinities away, so the amax is where a non-finite gradient shows.
struct ScaledView {
  TensorView values;
  const float* scale = nullptr;
  const float* amax = nullptr;
};

// norm = sqrt(sum over all gradients of (scale * value)^2), accumulated in f64 in an order that
// depends on the shapes only. amax[i] = |scale| * max |value| of gradient i. A gradient that
// carries a non-finite amax makes both its amax[i] and the norm NaN.
void grad_norm(float* norm, float* amax, const ScaledView* grads, int64_t count);

// target += other, re-encoded with the just-in-time scale of the sum (MS-AMP's add_to_fp8).
// Writes target's scale and amax; the amax is NaN where either amax was not finite.
void accumulate(const TensorView& target, float* scale, float* amax, const ScaledView& other);

}  // namespace quaver::cpu
