// The gradients of an activation from its saved FP8 inputs, cast to both GEMM layouts from
// registers (quaver/activate.h). A block computes a tile of both gradients. Where a scale is chosen
// just in time, an earlier pass computes the amaxes.
#include "../arguments.h"
#include "dispatch.h"
#include "fused_cast.h"
#include "quaver/activate.h"

namespace quaver::cuda {
namespace {

template <class X>
struct Problem {
  Matrix m;
  DeviceCast dx, dup;
  DeviceGroups x, up;  // up without codes: dup is none
  const X* dy;
  const float* channel_scale;
  bool aligned, aligned_scale;
};

// Computes dx and dup of up to kVector values, with zeros behind them.
template <class X, Activation kind>
QUAVER_DEVICE void gradients(const Problem<X>& p, const Fragment& at, float (&dx)[kVector],
                             float (&dup)[kVector]) {
  float x[kVector];
  const int64_t i = at.row * p.m.cols + at.col;
  decode_vector<X>(load<sizeof(X)>(p.dy + i, sizeof(X), at.n, p.aligned), dx);
  load_vector(p.x, at.row, at.col, at.n, x);
  if (p.channel_scale != nullptr) {
    float scale[kVector];
    decode_vector<float>(load<4>(p.channel_scale + at.col, 4, at.n, p.aligned_scale), scale);
#pragma unroll
    for (int k = 0; k < kVector; ++k) dx[k] *= scale[k];
  }
  if (p.up.codes == nullptr) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) dx[k] *= activation_slope<kind>(x[k]);
    return;
  }
  load_vector(p.up, at.row, at.col, at.n, dup);
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    const Gradients d = activation_gradients<kind>(dx[k], x[k], dup[k]);
    dx[k] = d.x;
    dup[k] = d.up;
  }
}

// The pass that only computes amaxes is the same kernel without the cast, which saves half the
// code.
template <class X, Activation kind>
__global__ void __launch_bounds__(kThreads) activate_backward_kernel(Problem<X> p, bool first) {
  __shared__ Tile tile, tile_up;
  __shared__ Divisor by, by_up;  // in registers they would spill on sm_100
  const bool gated = p.up.codes != nullptr;
  const CastPass of = cast_pass(p.dx.scale, first);
  const CastPass of_up = gated ? cast_pass(p.dup.scale, first) : CastPass{false, false, 1.0f};
  if (!of.encode && !of.collect && !of_up.encode && !of_up.collect) return;
  if (threadIdx.x == 0) {
    by = divisor(of.scale);
    by_up = divisor(of_up.scale);
  }
  __syncthreads();
  uint32_t seen = 0, seen_up = 0;
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const Fragment at = fragment_in_pass(p.m, pass);
    float dx[kVector], dup[kVector];
    gradients<X, kind>(p, at, dx, dup);
    seen = max_bits(seen, amax_bits(dx));
    if (of.encode) put_values(p.dx, tile, p.m, at, dx, by);
    if (!gated) continue;
    seen_up = max_bits(seen_up, amax_bits(dup));
    if (of_up.encode) put_values(p.dup, tile_up, p.m, at, dup, by_up);
  }
  __syncthreads();
  if (of.encode) store_qt(p.dx, tile, p.m);
  if (of_up.encode) store_qt(p.dup, tile_up, p.m);
  if (of.collect) block_atomic_max(p.dx.scale.amax, seen);
  if (of_up.collect) block_atomic_max(p.dup.scale.amax, seen_up);
}

}  // namespace

void activate_backward(const GemmCast& dx, const GemmCast& dup, const TensorView& dy,
                       const GroupedView& x, const GroupedView& up, const float* channel_scale,
                       Activation kind, void* stream) {
  const char* op = "activate_backward";
  check_activate_backward(dx, dup, dy, x, up);
  with_float(dy.dtype, [&](auto type) {
    using X = decltype(type);
    Problem<X> p;
    p.m = make_matrix(dy.rows, dy.cols);
    p.dx = device_cast(dx);
    p.dup = device_cast(dup);
    p.x = device_groups(x, 0);
    p.up = device_groups(up, 0);
    p.dy = dy.as<const X>();
    p.channel_scale = channel_scale;
    p.aligned = dy.cols % kVector == 0 && is_aligned(dy.data);
    p.aligned_scale = is_aligned(channel_scale);
    const bool gated = p.up.codes != nullptr;
    begin_scale(op, p.dx.scale, stream);
    if (gated) begin_scale(op, p.dup.scale, stream);
    const int64_t blocks = matrix_blocks(p.m);
    with_kind(kind, [&](auto k) {
      constexpr Activation f = decltype(k)::value;
      launch(op, activate_backward_kernel<X, f>, blocks, kThreads, stream, p, true);
      launch(op, activate_backward_kernel<X, f>, blocks, kThreads, stream, p, false);
    });
    end_scale(op, p.dx.scale, stream);
    if (gated) end_scale(op, p.dup.scale, stream);
  });
}

}  // namespace quaver::cuda
