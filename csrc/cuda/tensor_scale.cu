#include "tensor_scale.h"

namespace quaver::cuda {
namespace {

__global__ void prologue_kernel(TensorScale s) {
  *s.amax = 0.0f;
  *s.scale = delayed_scale(s.history, s.finite_max, s.power_of_two);
}

__global__ void epilogue_kernel(TensorScale s) {
  float scale = *s.scale;
  if (is_stale(scale, *s.amax, s.finite_max))
    scale = scale_from_amax(*s.amax, s.finite_max, s.power_of_two);
  *s.scale = written_scale(s, scale);
  record_amax(s.history, *s.amax);
}

}  // namespace

void begin_scale(const char* op, const TensorScale& s, void* stream) {
  if (s.mode == ScaleMode::delayed)
    launch(op, prologue_kernel, 1, 1, stream, s);
  else
    clear(op, s.amax, sizeof(float), stream);
}

void end_scale(const char* op, const TensorScale& s, void* stream) {
  if (s.mode == ScaleMode::delayed) launch(op, epilogue_kernel, 1, 1, stream, s);
}

}  // namespace quaver::cuda
