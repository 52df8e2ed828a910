#include "dispatch.h"
#include "scale.h"

namespace quaver::cuda {
namespace {

__global__ void prologue_kernel(TensorScale s) {
  *s.amax = 0.0f;
  *s.scale = delayed_scale(s.history, s.finite_max, s.power_of_two);
}

template <class X>
__global__ void __launch_bounds__(kThreads)
    amax_kernel(const X* x, int64_t n, TensorScale s, bool aligned) {
  if (!is_measured(s)) return;
  uint32_t seen = 0;
  const int64_t step = int64_t(gridDim.x) * kBlockSpan;
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVector; i < n; i += step) {
    float v[kVector];
    decode_vector<X>(load<sizeof(X)>(x + i, sizeof(X), n - i, aligned), v);
    seen = max_bits(seen, amax_bits(v));
  }
  block_atomic_max(s.amax, seen);
}

__global__ void epilogue_kernel(TensorScale s) {
  if (*s.scale == 0.0f) *s.scale = scale_from_amax(*s.amax, s.finite_max, s.power_of_two);
  record_amax(s.history, *s.amax);
}

}  // namespace

void clear_scale(const char* op, const TensorScale& s, void* stream) {
  if (s.mode == ScaleMode::delayed)
    launch(op, prologue_kernel, 1, 1, stream, s);
  else
    clear(op, s.amax, sizeof(float), stream);
}

void begin_scale(const char* op, const TensorScale& s, const TensorView& x, void* stream) {
  clear_scale(op, s, stream);
  if (s.mode == ScaleMode::given) return;
  with_float(x.dtype, [&](auto type) {
    using X = decltype(type);
    launch(op, amax_kernel<X>, loop_blocks(op, x.numel()), kThreads, stream, x.as<const X>(),
           x.numel(), s, is_aligned(x.data));
  });
}

void end_scale(const char* op, const TensorScale& s, void* stream) {
  if (s.mode == ScaleMode::delayed) launch(op, epilogue_kernel, 1, 1, stream, s);
}

}  // namespace quaver::cuda
