// RMSNorm and LayerNorm, cast to both GEMM layouts (quaver/normalize.h). First a warp on each row:
// its statistics, the saved copy of x and, where no scale is known yet, the amax of the result.
// Then a block on each tile normalises once more and casts from registers.
#include "../arguments.h"
#include "dispatch.h"
#include "row_sum.h"

namespace quaver::cuda {
namespace {

template <class X>
struct Problem {
  Matrix m;
  DeviceCast y;
  DeviceGroups saved;
  const X* x;
  DeviceChannels weight, bias;
  float *mean, *rstd;  // mean null: RMSNorm
  float eps;
  bool aligned;
};

template <class X>
QUAVER_DEVICE void load_x(const Problem<X>& p, int64_t row, int64_t col, int64_t n,
                          float (&x)[kVector]) {
  const X* from = p.x + row * p.m.cols + col;
  decode_vector<X>(load<sizeof(X)>(from, sizeof(X), n, p.aligned), x);
}

template <class X>
QUAVER_DEVICE void normalize_vector(const Problem<X>& p, int64_t col, int64_t n, float mean,
                                    float rstd, float (&x)[kVector]) {
#pragma unroll
  for (int k = 0; k < kVector; ++k) x[k] = normalized(x[k], mean, rstd);
  float c[kVector];
  if (p.weight.data != nullptr) {
    load_channels(p.weight, col, n, c);
#pragma unroll
    for (int k = 0; k < kVector; ++k) x[k] *= c[k];
  }
  if (p.bias.data != nullptr) {
    load_channels(p.bias, col, n, c);
#pragma unroll
    for (int k = 0; k < kVector; ++k) x[k] += c[k];
  }
  mask(x, n);
}

template <class X>
__global__ void __launch_bounds__(kThreads, 3) normalize_rows_kernel(Problem<X> p) {
  const RowPlace at = row_place();
  const bool active = at.row < p.m.rows;
  const int64_t cols = active ? p.m.cols : 0;
  const float count = static_cast<float>(p.m.cols > 0 ? p.m.cols : 1);
  float mean = 0.0f;
  if (p.mean != nullptr) {
    float lanes[kVector] = {};
    for (int64_t col = at.lane * kVector; col < cols; col += kRowLanes) {
      float x[kVector];
      load_x(p, at.row, col, cols - col, x);
#pragma unroll
      for (int k = 0; k < kVector; ++k) lanes[k] += x[k];
    }
    mean = row_sum(lanes) / count;
  }
  float lanes[kVector] = {};
  for (int64_t begin = 0; begin < cols; begin += kRowLanes) {  // the whole warp: groups exchange
    const int64_t col = begin + at.lane * kVector, n = cols - col;
    float x[kVector];
    load_x(p, at.row, col, n, x);
    if (p.saved.threads > 0) save_vector(p.saved, at.row, col, n, x);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float d = k < n ? x[k] - mean : 0.0f;
      lanes[k] += d * d;
    }
  }
  const float rstd = inverse_deviation(row_sum(lanes) / count, p.eps);
  if (active && at.lane == 0) {
    if (p.mean != nullptr) p.mean[at.row] = mean;
    p.rstd[at.row] = rstd;
  }
  const CastPass of = cast_pass(p.y.scale, true);
  if (of.encode || !of.collect) return;
  uint32_t seen = 0;
  for (int64_t col = at.lane * kVector; col < cols; col += kRowLanes) {
    float x[kVector];
    load_x(p, at.row, col, cols - col, x);
    normalize_vector(p, col, cols - col, mean, rstd, x);
    seen = max_bits(seen, amax_bits(x));
  }
  block_atomic_max(p.y.scale.amax, seen);
}

template <class X>
__global__ void __launch_bounds__(kThreads) normalize_cast_kernel(Problem<X> p, bool first) {
  __shared__ Tile tile;
  const CastPass of = cast_pass(p.y.scale, first);
  if (!of.encode) return;
  const Divisor by = divisor(of.scale);
  uint32_t seen = 0;
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const Fragment at = fragment_in_pass(p.m, pass);
    float v[kVector];
    load_x(p, at.row, at.col, at.n, v);
    if (at.n > 0)
      normalize_vector(p, at.col, at.n, p.mean != nullptr ? p.mean[at.row] : 0.0f, p.rstd[at.row],
                       v);
    seen = max_bits(seen, amax_bits(v));
    put_values(p.y, tile, p.m, at, v, by);
  }
  __syncthreads();
  store_qt(p.y, tile, p.m);
  if (of.collect) block_atomic_max(p.y.scale.amax, seen);
}

}  // namespace

void normalize(const GemmCast& y, const GroupedView& saved, float* mean, float* rstd,
               const TensorView& x, const TensorView& weight, const TensorView& bias, float eps,
               void* stream) {
  const char* op = "normalize";
  check_normalize(y, saved, x, weight, bias);
  with_float(x.dtype, [&](auto type) {
    using X = decltype(type);
    Problem<X> p;
    p.m = make_matrix(x.rows, x.cols);
    p.y = device_cast(y);
    p.saved = device_groups(saved, kWarp);
    p.x = x.as<const X>();
    p.weight = device_channels(weight);
    p.bias = device_channels(bias);
    p.mean = mean;
    p.rstd = rstd;
    p.eps = eps;
    p.aligned = x.cols % kVector == 0 && is_aligned(x.data);
    begin_scale(op, p.y.scale, stream);
    if (p.saved.threads == 0) save_groups(op, saved, x, stream);
    launch(op, normalize_rows_kernel<X>, row_blocks(x.rows), kThreads, stream, p);
    const int64_t blocks = matrix_blocks(p.m);
    if (p.y.scale.mode == ScaleMode::delayed)  // otherwise the rows are the first pass
      launch(op, normalize_cast_kernel<X>, blocks, kThreads, stream, p, true);
    launch(op, normalize_cast_kernel<X>, blocks, kThreads, stream, p, false);
    end_scale(op, p.y.scale, stream);
  });
}

}  // namespace quaver::cuda
