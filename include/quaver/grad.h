// Stage "gradient": norm, finite check and FP8 accumulation.
#pragma once

#include "quaver/tensor_view.h"

namespace quaver {

// One gradient, its decode scale (null: 1) and the amax seen when it was encoded (null: its own).
// FP8 saturates infinities away, so the amax is where a non-finite gradient shows.
struct ScaledView {
  TensorView values;
  const float* scale = nullptr;
  const float* amax = nullptr;
};

// The order of the norm's f64 sum, which depends on shapes only and is the same on every device. A
// gradient is cut into pieces. In a piece element i goes to lane i % kNormLanes; each 16
// neighbouring lanes are added in order, and the 32 results in a tree. Piece p, scaled, goes to
// strand p % kNormStrands, and the strands are added in a tree. (A tree adds its upper half to its
// lower one until one is left.)
constexpr int64_t kNormPiece = 1 << 14;
constexpr int kNormLanes = 512;
constexpr int kNormStrands = 256;

namespace cpu {

// norm = sqrt(sum over all gradients of (scale * value)^2), accumulated in f64 in the
// order above. amax[i] = |scale| * max |value| of gradient i. A gradient that carries a non-finite
// amax makes both its amax[i] and the norm NaN.
void grad_norm(float* norm, float* amax, const ScaledView* grads, int64_t count);

// target += other, re-encoded with the just-in-time scale of the sum (MS-AMP's add_to_fp8).
// Writes target's scale and amax; the amax is NaN where either amax was not finite.
void accumulate(const TensorView& target, float* scale, float* amax, const ScaledView& other);

}  // namespace cpu

namespace cuda {

// The same, on the device; `workspace` is device memory, 16-byte aligned.
int64_t grad_norm_workspace_bytes(const ScaledView* grads, int64_t count);
void grad_norm(float* norm, float* amax, const ScaledView* grads, int64_t count, void* workspace,
               void* stream);

constexpr int64_t kAccumulateWorkspaceBytes = 16;
void accumulate(const TensorView& target, float* scale, float* amax, const ScaledView& other,
                void* workspace, void* stream);

}  // namespace cuda
}  // namespace quaver
