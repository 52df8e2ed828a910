// RMSNorm and LayerNorm, cast to both GEMM layouts (quaver/normalize.h). First a warp on each row:
// its statistics, the saved copy of x and, where the scale is just in time, the amax of the result.
// Then a block on each tile normalises once more and casts from registers.
#include "../arguments.h"
#include "dispatch.h"
#include "row_sum.h"

namespace quaver::cuda {
namespace {

template <class X>
struct Problem {
  Matrix m;
  int64_t tiles;
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

// Writes the statistics of a warp's row, saves it and returns the largest magnitude of its result
// where `collect`.
template <class X>
QUAVER_DEVICE uint32_t normalize_row(const Problem<X>& p, RowPlace at, bool collect) {
  const int64_t cols = p.m.cols;
  const float count = static_cast<float>(cols > 0 ? cols : 1);
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
  if (at.lane == 0) {
    if (p.mean != nullptr) p.mean[at.row] = mean;
    p.rstd[at.row] = rstd;
  }
  uint32_t seen = 0;
  if (!collect) return seen;
  for (int64_t col = at.lane * kVector; col < cols; col += kRowLanes) {
    float x[kVector];
    load_x(p, at.row, col, cols - col, x);
    normalize_vector(p, col, cols - col, mean, rstd, x);
    seen = max_bits(seen, amax_bits(x));
  }
  return seen;
}

// Where the scale is just in time, the rows are the first pass, of few blocks.
template <class X>
__global__ void __launch_bounds__(kThreads, 3) normalize_rows_kernel(Problem<X> p) {
  // Each thread's own; without `volatile` it would be in a register, and spill on sm_80.
  __shared__ volatile uint32_t most[kThreads];
  const bool collect = p.y.scale.mode == ScaleMode::now;
  most[threadIdx.x] = 0;
  for (RowPlace at = row_place(); at.row < p.m.rows; at.row += int64_t(gridDim.x) * kWarps) {
    const uint32_t seen = normalize_row(p, at, collect);
    most[threadIdx.x] = max_bits(most[threadIdx.x], seen);
  }
  if (collect) leave_amax(p.y.scale, blockIdx.x, most[threadIdx.x]);
}

template <class X>
__global__ void __launch_bounds__(kThreads) normalize_cast_kernel(Problem<X> p, bool first) {
  __shared__ Tile tile;
  __shared__ CastPass of;
  cast_pass(p.y.scale, first, blockIdx.x, of);
  if (!of.encode && !of.collect) return;
  uint32_t seen = 0;
  for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x) {
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
      const Fragment at = fragment_in_pass(p.m, index, pass);
      float v[kVector];
      load_x(p, at.row, at.col, at.n, v);
      if (at.n > 0)
        normalize_vector(p, at.col, at.n, p.mean != nullptr ? p.mean[at.row] : 0.0f, p.rstd[at.row],
                         v);
      seen = max_bits(seen, amax_bits(v));
      if (of.encode) put_values(p.y, tile, p.m, at, v, of.by);
    }
    __syncthreads();
    if (of.encode) store_qt(p.y, tile, p.m, index);
    __syncthreads();
  }
  if (of.collect) leave_amax(p.y.scale, blockIdx.x, seen);
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
    p.tiles = matrix_tiles(p.m);
    p.y = device_cast(op, y);
    p.saved = device_groups(saved, kWarp);
    p.x = x.as<const X>();
    p.weight = device_channels(weight);
    p.bias = device_channels(bias);
    p.mean = mean;
    p.rstd = rstd;
    p.eps = eps;
    p.aligned = x.cols % kVector == 0 && is_aligned(x.data);
    if (p.saved.threads == 0) save_groups(op, saved, x, stream);
    const ScaleMode mode = p.y.scale.mode;
    const int64_t rows = row_blocks(x.rows);
    CastBlocks blocks = cast_blocks(op, mode, p.tiles);
    if (mode == ScaleMode::now) blocks.first = std::min(rows, most_loop_blocks(op));
    if (mode != ScaleMode::now) launch(op, normalize_rows_kernel<X>, rows, kThreads, stream, p);
    cast_in_passes(op, &p.y.scale, blocks, stream, [&](bool first, int64_t count) {
      if (first && mode == ScaleMode::now)
        launch(op, normalize_rows_kernel<X>, count, kThreads, stream, p);
      else
        launch(op, normalize_cast_kernel<X>, count, kThreads, stream, p, first);
    });
  });
}

}  // namespace quaver::cuda
