// The kernel that computes the scales that all ranks encode with, from the amaxes of all ranks. One
// thread computes one tensor's.
#include "../arguments.h"
#include "vector.h"

namespace quaver::cuda {
namespace {

__global__ void __launch_bounds__(kThreads)
    share_scales_kernel(float* scales, float* sum_scales, const float* amaxes, const float* mu,
                        int64_t ranks, int64_t count, float finite_max) {
  const int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= count) return;
  const SharedScale s =
      shared_scale(amaxes + t, ranks, count, finite_max, mu != nullptr ? mu + t : nullptr);
  scales[t] = s.scale;
  sum_scales[t] = s.sum_scale;
}

}  // namespace

void share_scales(float* scales, float* sum_scales, const float* amaxes, const float* mu,
                  int64_t ranks, int64_t count, DType dtype, void* stream) {
  check_share_scales(dtype, ranks);
  if (count == 0) return;
  launch("share_scales", share_scales_kernel, ceil_div(count, kThreads), kThreads, stream, scales,
         sum_scales, amaxes, mu, ranks, count, scale_max(dtype));
}

}  // namespace quaver::cuda
