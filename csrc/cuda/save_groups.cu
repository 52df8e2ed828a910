// The kernels of this file write the FP8 copy (quaver/cast.h) where a block does not fit the fused
// kernel's vectors: its length is odd, very large, or a multiple of 16 but no power of two.
#include "dispatch.h"
#include "fused_cast.h"

namespace quaver::cuda {
namespace {

template <class X>
__global__ void __launch_bounds__(kThreads)
    save_groups_kernel(uint8_t* codes, uint8_t* scale, const X* x, ScaleSets sets, int64_t gap,
                       bool aligned) {
  constexpr int kRun = run_length(sizeof(X));
  const Span span = span_of(sets, blockIdx.x, threadIdx.x);
  if (gap != 0) x += span.first / sets.cols * gap;
  const int64_t step = int64_t(sets.threads) * kVector;
  const int64_t begin = threadIdx.x % sets.threads * kRun, apart = sets.threads * kRun;
  float v[kVector];
  uint32_t seen = 0;
  for (int64_t i = begin; i < span.n; i += step) {
    decode_vector<X>(load_runs<kRun>(x + span.first + i, apart, span.n - i, aligned), v);
    seen = max_bits(seen, amax_bits(v));
  }
  seen = group_max(seen, sets.threads);
  if (span.n == 0) return;
  const uint32_t code = block_exponent(seen);
  if (begin == 0) scale[span.group] = static_cast<uint8_t>(code);
  for (int64_t i = begin; i < span.n; i += step) {
    decode_vector<X>(load_runs<kRun>(x + span.first + i, apart, span.n - i, aligned), v);
#pragma unroll
    for (int k = 0; k < kVector; ++k) v[k] *= block_inverse(code);
    Packed<1> packed;
    encode_vector<e4m3>(v, packed);
    store_runs<kRun>(codes + span.first + i, packed, apart, span.n - i, aligned);
  }
}

}  // namespace

void save_groups(const char* op, const GroupedView& to, const RowsView& x, void* stream) {
  const ScaleSets sets = make_scale_sets(x, to.layout);
  if (sets.count == 0) return;
  with_float(x.dtype, [&](auto type) {
    using X = decltype(type);
    launch(op, save_groups_kernel<X>, scale_set_blocks(sets), kThreads, stream,
           to.codes.as<uint8_t>(), to.scale, x.as<const X>(), sets, x.pitch - x.cols,
           x.pitch % kVector == x.cols % kVector && are_aligned(sets, x.data, to.codes.data));
  });
}

}  // namespace quaver::cuda
