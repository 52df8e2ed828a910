// Stage "quantize": high precision to FP8 (or scaled f16) and back. x ~= scale * q.
#pragma once

#include "quaver/layout.h"
#include "quaver/scale.h"

namespace quaver {

struct QuantizeOptions {
  Layout layout;
  bool power_of_two = true;  // round chosen scales up to a power of two
  bool stochastic = false;   // nearest-even otherwise
  uint64_t seed = 0;         // of the stochastic rounding
};

// The source of a cast's scale.
struct ScaleSource {
  bool given = false;         // read `scale`; otherwise it is chosen and written
  float* history = nullptr;   // delayed scaling state (kHistoryState f32), read and updated;
                              // Grain::tensor only, and not together with `given`
  bool spread_nan = false;    // write a chosen scale as `nan_unless_finite` (Grain::tensor only)
  void* workspace = nullptr;  // of CUDA's casts of Grain::tensor: cast_workspace_bytes, 16-byte
                              // aligned; needed by all that choose a scale or give the amax
};

namespace cpu {

// q (e4m3, e5m2, f16) like x (f32, f16, bf16); scale and amax f32, one for each of the layout's
// scales.
void quantize(const TensorView& q, const TensorView& scale, const TensorView& amax,
              const TensorView& x, const QuantizeOptions& options, const ScaleSource& source);

// out (f32, f16, bf16) = scale * q.
void dequantize(const TensorView& out, const TensorView& q, const TensorView& scale,
                const Layout& layout);

// Both GEMM layouts from one read: q [rows, cols] and qt [cols, rows], one scale and amax.
void cast_transpose(const TensorView& q, const TensorView& qt, const TensorView& scale,
                    const TensorView& amax, const TensorView& x, bool power_of_two,
                    const ScaleSource& source);

}  // namespace cpu

// The same on the device, in `stream` (a cudaStream_t): all pointers are device pointers, scales,
// amaxes and histories included, and nothing waits.
namespace cuda {

// For casts of [rows, cols] on the current device.
int64_t cast_workspace_bytes(int64_t rows, int64_t cols);

void quantize(const TensorView& q, const TensorView& scale, const TensorView& amax,
              const TensorView& x, const QuantizeOptions& options, const ScaleSource& source,
              void* stream);
void dequantize(const TensorView& out, const TensorView& q, const TensorView& scale,
                const Layout& layout, void* stream);
void cast_transpose(const TensorView& q, const TensorView& qt, const TensorView& scale,
                    const TensorView& amax, const TensorView& x, bool power_of_two,
                    const ScaleSource& source, void* stream);

}  // namespace cuda
}  // namespace quaver
