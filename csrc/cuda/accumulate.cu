// The kernels of target += other, in place, which re-encode target with the just-in-time scale of
// the sum (MS-AMP's add_to_fp8). An FP8 target is read twice: the scale must be known before the
// first code is overwritten.
#include "../arguments.h"
#include "dispatch.h"
#include "runtime_type.h"

namespace quaver::cuda {
namespace {

struct Sum {
  void* target;
  const void* other;
  DType type, other_type;
  int64_t n;
  float* scale;
  float* amax;
  const float* other_scale;  // null: 1
  const float* other_amax;   // null: its own
  float* sum_amax;           // workspace
  bool aligned;
};

QUAVER_DEVICE float new_scale(const Sum& s) {
  if (!is_fp8(s.type)) return 1.0f;
  return scale_from_amax(*s.sum_amax, scale_max(s.type), true, *s.scale);
}

template <bool kWrite>
__global__ void __launch_bounds__(kThreads) accumulate_kernel(Sum s) {
  const float scale = *s.scale, other_scale = s.other_scale != nullptr ? *s.other_scale : 1.0f;
  const float inverse = kWrite ? 1.0f / new_scale(s) : 1.0f;
  const bool collect = !kWrite || !is_fp8(s.type);
  uint32_t seen = 0;
  const int64_t step = int64_t(gridDim.x) * kThreads * kQuad;
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kQuad; i < s.n; i += step) {
    AnyQuad a = load_quad(s.target, s.type, i, s.n - i, s.aligned);
    const AnyQuad b = load_quad(s.other, s.other_type, i, s.n - i, s.aligned);
    float sum[kQuad], addend[kQuad];
    decode_any(s.type, a, 0, scale, sum);
    decode_any(s.other_type, b, 0, other_scale, addend);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) sum[k] += addend[k];
    if (collect) seen = max_bits(seen, amax_bits(sum));
    if (!kWrite) continue;
    encode_any(s.type, sum, inverse, 0, a);
    store_quad(s.target, s.type, i, a, s.n - i, s.aligned);
  }
  if (collect) block_atomic_max(s.sum_amax, seen);
}

__global__ void finish_kernel(Sum s) {
  const bool finite = is_finite(*s.amax) && (s.other_amax == nullptr || is_finite(*s.other_amax));
  const float scale = new_scale(s);
  *s.scale = scale;
  *s.amax = finite ? *s.sum_amax : bit_cast<float>(0x7fc00000u);
}

}  // namespace

void accumulate(const TensorView& target, float* scale, float* amax, const ScaledView& other,
                void* workspace, void* stream) {
  const char* op = "accumulate";
  check_accumulate(target, other);
  Sum s;
  s.target = target.data;
  s.other = other.values.data;
  s.type = target.dtype;
  s.other_type = other.values.dtype;
  s.n = target.numel();
  s.scale = scale;
  s.amax = amax;
  s.other_scale = other.scale;
  s.other_amax = other.amax;
  s.sum_amax = static_cast<float*>(workspace);
  s.aligned = is_aligned(target.data) && is_aligned(other.values.data);
  const int64_t blocks = loop_blocks(op, s.n);
  clear(op, s.sum_amax, sizeof(float), stream);
  if (is_fp8(s.type)) launch(op, accumulate_kernel<false>, blocks, kThreads, stream, s);
  launch(op, accumulate_kernel<true>, blocks, kThreads, stream, s);
  launch(op, finish_kernel, 1, 1, stream, s);
}

}  // namespace quaver::cuda
