// out = scale * q, with one scale for the tensor, each row, each 1 x B block, or each 128 x 128
// tile.
#include "../arguments.h"
#include "dispatch.h"

namespace quaver::cuda {
namespace {

template <class Q, class X>
constexpr int kRun = run_length(std::max(sizeof(Q), sizeof(X)));

template <class Q, class X>
QUAVER_DEVICE void decode_one(X* out, const Q* q, int64_t i, int64_t apart, int64_t n, float scale,
                              bool aligned) {
  float v[kVector];
  decode_vector<Q>(load_runs<kRun<Q, X>>(q + i, apart, n, aligned), v);
#pragma unroll
  for (int k = 0; k < kVector; ++k) v[k] *= scale;
  Packed<sizeof(X)> packed;
  encode_vector<X>(v, packed);
  store_runs<kRun<Q, X>>(out + i, packed, apart, n, aligned);
}

template <class Q, class X>
__global__ void __launch_bounds__(kThreads)
    dequantize_tensor_kernel(X* out, const Q* q, int64_t n, const float* scale, bool aligned) {
  const float s = *scale;
  const int64_t step = int64_t(gridDim.x) * kBlockSpan;
  for (int64_t i = blockIdx.x * kBlockSpan + threadIdx.x * kRun<Q, X>; i < n; i += step)
    decode_one(out, q, i, kThreads * kRun<Q, X>, n - i, s, aligned);
}

template <class Q, class X>
__global__ void __launch_bounds__(kThreads)
    dequantize_groups_kernel(X* out, const Q* q, const float* scales, ScaleSets sets,
                             bool aligned) {
  const Span span = span_of(sets, blockIdx.x, threadIdx.x);
  if (span.n == 0) return;
  const float s = scales[span.scale];
  for (int64_t i = threadIdx.x % sets.threads * kRun<Q, X>; i < span.n;
       i += int64_t(sets.threads) * kVector)
    decode_one(out, q, span.first + i, sets.threads * kRun<Q, X>, span.n - i, s, aligned);
}

template <class Q, class X>
void run(const TensorView& out, const TensorView& q, const float* scale, const Layout& layout,
         void* stream) {
  const char* op = "dequantize";
  if (layout.grain == Grain::tensor) {
    launch(op, dequantize_tensor_kernel<Q, X>, loop_blocks(op, q.numel()), kThreads, stream,
           out.as<X>(), q.as<const Q>(), q.numel(), scale,
           is_aligned(out.data) && is_aligned(q.data));
    return;
  }
  const ScaleSets sets = make_scale_sets(q, layout);
  launch(op, dequantize_groups_kernel<Q, X>, scale_set_blocks(sets), kThreads, stream, out.as<X>(),
         q.as<const Q>(), scale, sets, are_aligned(sets, out.data, q.data));
}

}  // namespace

void dequantize(const TensorView& out, const TensorView& q, const TensorView& scale,
                const Layout& layout, void* stream) {
  check_dequantize(out, q, scale, layout);
  if (q.numel() == 0) return;
  with_any(q.dtype, [&](auto from) {
    with_float(out.dtype, [&](auto to) {
      run<decltype(from), decltype(to)>(out, q, scale.as<const float>(), layout, stream);
    });
  });
}

}  // namespace quaver::cuda
