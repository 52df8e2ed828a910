// The scale of a whole-tensor cast, chosen on the device: the host never waits for it. A cast is up
// to two passes of one kernel, of which a pass with nothing to do returns at once:
//
//   given    the second pass casts with the caller's scale and collects the amax
//   now      the first pass collects the amax, the second casts (just in time)
//   delayed  a prologue reads the history's forecast; the first pass casts with it, if there is
//   one,
//            and collects the amax; the second casts just in time where the forecast is stale; an
//            epilogue records the amax (FP8-LM, arXiv 2310.18313; see quaver/scale.h)
#pragma once

#include "quaver/quantize.h"
#include "vector.h"

namespace quaver::cuda {

enum class ScaleMode : int8_t { given, now, delayed };

struct TensorScale {
  float* scale;
  float* amax;
  float* history;
  float finite_max;
  bool power_of_two, spread_nan;
  ScaleMode mode;
};

inline TensorScale tensor_scale(DType type, const TensorView& scale, const TensorView& amax,
                                bool power_of_two, const ScaleSource& source) {
  const ScaleMode mode = source.given                ? ScaleMode::given
                         : source.history != nullptr ? ScaleMode::delayed
                                                     : ScaleMode::now;
  return {scale.as<float>(),
          amax.as<float>(),
          source.history,
          scale_max(type),
          power_of_two,
          source.spread_nan,
          mode};
}

// Before the passes: clears the amax, and reads the history's forecast where there is one.
void begin_scale(const char* op, const TensorScale& s, void* stream);

// After them: records the amax.
void end_scale(const char* op, const TensorScale& s, void* stream);

// Launches pass(first) for each pass of the mode.
template <class Pass>
void cast_in_passes(const char* op, const TensorScale& s, void* stream, Pass pass) {
  begin_scale(op, s, stream);
  if (s.mode != ScaleMode::given) pass(true);
  pass(false);
  end_scale(op, s, stream);
}

// The scale that readers get.
QUAVER_DEVICE float written_scale(const TensorScale& s, float scale) {
  return s.spread_nan ? nan_unless_finite(scale, *s.amax) : scale;
}

// The work of a pass: to encode, to collect the amax, both or nothing.
struct CastPass {
  bool encode, collect;
  float scale;  // to encode with
};

QUAVER_DEVICE CastPass cast_pass(const TensorScale& s, bool first) {
  if (s.mode == ScaleMode::given) return {!first, !first, *s.scale};
  const float forecast = s.mode == ScaleMode::delayed ? *s.scale : 0.0f;
  if (first) return {forecast != 0.0f, true, forecast};
  if (!is_stale(forecast, *s.amax, s.finite_max)) return {false, false, forecast};
  const float scale = scale_from_amax(*s.amax, s.finite_max, s.power_of_two);
  // Only this mode: a delayed cast's other blocks still read the forecast.
  if (s.mode == ScaleMode::now && blockIdx.x == 0 && threadIdx.x == 0)
    *s.scale = written_scale(s, scale);
  return {true, false, scale};
}

}  // namespace quaver::cuda
