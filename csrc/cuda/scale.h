// The scale of a whole-tensor cast, chosen on the device: the host never waits to learn it.
//
//   given    the caller's scale; the cast collects the amax
//   now      amax pass, then the cast (just in time)
//   delayed  a prologue reads the history; the amax pass leaves at once where the history gave a
//            scale; an epilogue records the amax (FP8-LM, arXiv 2310.18313; see quaver/scale.h)
#pragma once

#include "device.h"
#include "quaver/quantize.h"

namespace quaver::cuda {

enum class ScaleMode : int8_t { given, now, delayed };

struct TensorScale {
  float* scale;
  float* amax;
  float* history;
  float finite_max;
  bool power_of_two;
  ScaleMode mode;
};

inline TensorScale tensor_scale(DType type, const TensorView& scale, const TensorView& amax,
                                bool power_of_two, const ScaleSource& source) {
  const ScaleMode mode = source.given                ? ScaleMode::given
                         : source.history != nullptr ? ScaleMode::delayed
                                                     : ScaleMode::now;
  return {scale.as<float>(), amax.as<float>(), source.history, scale_max(type), power_of_two, mode};
}

// Before all: clears the amax, and reads the scale from the history where there is one.
void clear_scale(const char* op, const TensorScale& s, void* stream);

// Before the cast: the same, and the amax of x where the scale is to be chosen from it.
void begin_scale(const char* op, const TensorScale& s, const TensorView& x, void* stream);

// After the cast.
void end_scale(const char* op, const TensorScale& s, void* stream);

// In the kernels: whether the scale is chosen just in time, so that a pass for the amax goes
// before.
QUAVER_DEVICE bool is_measured(const TensorScale& s) {
  return s.mode == ScaleMode::now || (s.mode == ScaleMode::delayed && *s.scale == 0.0f);
}

// In the cast: the scale, and whether the amax is the tensor's already.
QUAVER_DEVICE float scale_in_cast(const TensorScale& s, bool* known) {
  *known = is_measured(s);
  if (!*known) return *s.scale;
  const float scale = scale_from_amax(*s.amax, s.finite_max, s.power_of_two);
  // Only this mode: a delayed cast's other blocks still read the zero that says "just in time".
  if (s.mode == ScaleMode::now && blockIdx.x == 0 && threadIdx.x == 0) *s.scale = scale;
  return scale;
}

}  // namespace quaver::cuda
