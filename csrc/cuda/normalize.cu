// RMSNorm and LayerNorm, cast to both GEMM layouts (quaver/normalize.h). First a warp on each row:
// its statistics, the saved copy of x and, where the scale is just in time, the amax of the result.
// Then a block on each tile normalises once more and casts from registers, to scales of blocks in
// the same pass that finds them.
#include "../arguments.h"
#include "../check_cast_layouts.h"
#include "dispatch.h"
#include "layouts.h"
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
  bool fast;  // a fast path (fused_cast.h) is for it
};

// What a fast path knows of a problem: RMSNorm with weights, saved in groups that are a tile wide.
template <bool kFast, class X>
QUAVER_DEVICE Problem<X> with_known(Problem<X> p) {
  if (!kFast) return p;
  p.y = as_aligned<DType::e4m3>(p.y);
  p.saved = as_tile_wide(p.saved);
  p.mean = nullptr;
  p.bias.data = nullptr;
  p.aligned = true;
  return p;
}

template <class X>
bool is_fast(const Problem<X>& p) {
  return p.mean == nullptr && p.bias.data == nullptr && p.weight.data != nullptr && p.aligned &&
         p.y.aligned && p.y.type == DType::e4m3 && are_tile_wide(p.saved);
}

template <class X>
constexpr int kRun = run_length(sizeof(X));

template <class X>
QUAVER_DEVICE void load_x(const Problem<X>& p, int64_t row, int64_t col, int apart, int64_t n,
                          float (&x)[kVector]) {
  const X* from = p.x + row * p.m.cols + col;
  decode_vector<X>(load_runs<kRun<X>>(from, apart, n, p.aligned), x);
}

// Weights of a thread's columns; 1 where there are none.
template <class X>
QUAVER_DEVICE void load_weight(const Problem<X>& p, int64_t col, int apart, int64_t n,
                               float (&weight)[kVector]) {
  if (p.weight.data != nullptr) return load_channels<kRun<X>>(p.weight, col, apart, n, weight);
#pragma unroll
  for (int k = 0; k < kVector; ++k) weight[k] = 1.0f;
}

template <class X>
QUAVER_DEVICE void normalize_vector(const Problem<X>& p, int64_t col, int apart, int64_t n,
                                    float mean, float rstd, const float (&weight)[kVector],
                                    float (&x)[kVector]) {
  if (p.mean != nullptr) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) x[k] -= mean;
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) x[k] = x[k] * rstd * weight[k];
  if (p.bias.data != nullptr) {
    float bias[kVector];
    load_channels<kRun<X>>(p.bias, col, apart, n, bias);
#pragma unroll
    for (int k = 0; k < kVector; ++k) x[k] += bias[k];
  }
  mask_runs<kRun<X>>(x, apart, n);
}

// Saves a thread's part of a row and adds its squares to the lanes of the sum.
template <bool kFast, class X>
QUAVER_DEVICE void square(const Problem<X>& any, RowPlace at, int64_t begin, float mean,
                          float (&lanes)[kVector]) {
  constexpr int kApart = kRowRunsApart<kRun<X>>;
  const Problem<X> p = with_known<kFast>(any);
  const int64_t col = begin + at.lane * kRun<X>, n = kFast ? kRowLanes : p.m.cols - col;
  float x[kVector];
  load_x(p, at.row, col, kApart, n, x);
  float d[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) d[k] = p.mean != nullptr ? x[k] - mean : x[k];
  if (p.mean != nullptr) mask_runs<kRun<X>>(d, kApart, n);
#pragma unroll
  for (int k = 0; k < kVector; ++k) lanes[k] += d[k] * d[k];
  if (!p.saved.held) return;
  const uint32_t seen = save_vector<kRun<X>, kFast>(p.saved, at.row, col, kApart, n, x);
  if (kFast && !is_number(__reduce_max_sync(kAllLanes, seen)))
    save_vector<kRun<X>>(any.saved, at.row, col, kApart, n, x);
}

// Writes the statistics of a warp's row, saves it and returns the largest magnitude of its result
// where the kernel collects.
template <bool kCollect, class X>
QUAVER_DEVICE uint32_t normalize_row(const Problem<X>& p, RowPlace at) {
  constexpr int kApart = kRowRunsApart<kRun<X>>;
  const int64_t cols = p.m.cols;
  const float count = static_cast<float>(cols > 0 ? cols : 1);
  float mean = 0.0f;
  if (p.mean != nullptr) {
    float lanes[kVector] = {};
    for (int64_t col = at.lane * kRun<X>; col < cols; col += kRowLanes) {
      float x[kVector];
      load_x(p, at.row, col, kApart, cols - col, x);
#pragma unroll
      for (int k = 0; k < kVector; ++k) lanes[k] += x[k];
    }
    mean = row_sum<kRun<X>>(lanes) / count;
  }
  float lanes[kVector] = {};
  int64_t begin = 0;
  do {  // the whole warp: groups exchange
    if (!kCollect && p.fast && begin + kRowLanes <= cols)
      square<true>(p, at, begin, mean, lanes);
    else
      square<false>(p, at, begin, mean, lanes);
    begin += kRowLanes;
  } while (begin < cols);
  const float rstd = inverse_deviation(row_sum<kRun<X>>(lanes) / count, p.eps);
  if (at.lane == 0) {
    if (p.mean != nullptr) p.mean[at.row] = mean;
    p.rstd[at.row] = rstd;
  }
  uint32_t seen = 0;
  for (int64_t col = kCollect ? at.lane * kRun<X> : cols; col < cols; col += kRowLanes) {
    float x[kVector], weight[kVector];
    load_x(p, at.row, col, kApart, cols - col, x);
    load_weight(p, col, kApart, cols - col, weight);
    normalize_vector(p, col, kApart, cols - col, mean, rstd, weight, x);
    seen = max_bits(seen, amax_bits(x));
  }
  return seen;
}

// Where the scale is just in time, the rows are the first pass, of few blocks, and collect the
// amax. Both in one kernel would take too many registers.
template <class X>
__global__ void __launch_bounds__(kThreads, 3) normalize_rows_now_kernel(Problem<X> p) {
  // Each thread's own; without `volatile` it would be in a register, and spill on sm_80.
  __shared__ volatile uint32_t most[kThreads];
  most[threadIdx.x] = 0;
  for (RowPlace at = row_place(); at.row < p.m.rows; at.row += int64_t(gridDim.x) * kWarps) {
    const uint32_t seen = normalize_row<true>(p, at);
    most[threadIdx.x] = max_bits(most[threadIdx.x], seen);
  }
  leave_amax(p.y.scale, blockIdx.x, most[threadIdx.x]);
}

template <class X>
__global__ void __launch_bounds__(kThreads, 3) normalize_rows_kernel(Problem<X> p) {
  const RowPlace at = row_place();
  if (at.row < p.m.rows) normalize_row<false>(p, at);  // whole warps
}

// Normalises and casts what a thread has in one pass over a tile; returns the largest magnitude. A
// fast path takes all values for numbers.
template <bool kFast, class X>
QUAVER_DEVICE uint32_t cast_pass(const Problem<X>& any, Corner corner, int pass, CastPass of,
                                 const float (&weight)[kVector], Tile& tile) {
  constexpr int kApart = kRunsApart<kRun<X>>;
  const Problem<X> p = with_known<kFast>(any);
  auto at = fragment_in_pass<kRun<X>>(p.m, corner, pass);
  if (kFast) {
    of = {true, of.collect, of.scale, as_multiplication(of.by)};
    at = as_inside(at);
  }
  float v[kVector];
  load_x(p, at.row, at.col, kApart, at.n, v);
  if (at.n > 0)
    normalize_vector(p, at.col, kApart, at.n, p.mean != nullptr ? p.mean[at.row] : 0.0f,
                     p.rstd[at.row], weight, v);
  const uint32_t seen = amax_bits(v);
  if (of.encode) put_values(p.y, tile, at, v, kFast ? 0 : seen, of.by);
  return seen;
}

template <class X>
__global__ void __launch_bounds__(kThreads, 2) normalize_cast_kernel(Problem<X> p, bool first) {
  __shared__ Tile tile;
  __shared__ CastPass of;
  cast_pass(p.y.scale, first, blockIdx.x, of);
  if (!of.encode && !of.collect) return;
  const CastPass known = of;
  uint32_t most = 0;
  for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Corner corner = corner_of(p.m, index);
    const int64_t col = fragment_in_pass<kRun<X>>(p.m, corner, 0).col;
    float weight[kVector];  // of the thread's columns, which are those of every pass
    load_weight(p, col, kRunsApart<kRun<X>>, p.m.cols - col, weight);
    const bool fast = p.fast && known.encode && !known.by.divide && is_inside(p.m, corner);
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
      uint32_t seen = 0;
      if (fast) seen = cast_pass<true>(p, corner, pass, known, weight, tile);
      if (!fast || !is_number(seen)) seen = cast_pass<false>(p, corner, pass, known, weight, tile);
      most = max_bits(most, seen);
    }
    __syncthreads();
    if (known.encode) store_qt(p.y, tile, p.m, corner);
    __syncthreads();
  }
  if (known.collect) leave_amax(p.y.scale, blockIdx.x, most);
}

// The tile's values stay in registers: their scales follow from them, and then their codes.
template <class X>
__global__ void __launch_bounds__(kThreads, 1) normalize_blocks_kernel(Problem<X> p, Targets to) {
  constexpr int kApart = kRunsApart<kRun<X>>;
  __shared__ BlocksMemory memory;
  const Corner corner = corner_of_block(p.m);
  const int64_t col = fragment_in_pass<kRun<X>>(p.m, corner, 0).col;
  float weight[kVector];  // of the thread's columns, which are those of every pass
  load_weight(p, col, kApart, p.m.cols - col, weight);
  float y[kPasses][kVector];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto at = fragment_in_pass<kRun<X>>(p.m, corner, pass);
    load_x(p, at.row, at.col, kApart, at.n, y[pass]);
    if (at.n > 0)
      normalize_vector(p, at.col, kApart, at.n, p.mean != nullptr ? p.mean[at.row] : 0.0f,
                       p.rstd[at.row], weight, y[pass]);
  }
  cast_blocks<kRun<X>, void>(to, Kept{y}, corner.row / kTile, corner.col / kTile, memory);
}

// A problem without its cast.
template <class X>
Problem<X> make_problem(const GroupedView& saved, float* mean, float* rstd, const TensorView& x,
                        const TensorView& weight, const TensorView& bias, float eps) {
  Problem<X> p = {};
  p.m = make_matrix(x.rows, x.cols);
  p.tiles = matrix_tiles(p.m);
  p.saved = device_groups(saved, kWarp);
  p.x = x.as<const X>();
  p.weight = device_channels(weight);
  p.bias = device_channels(bias);
  p.mean = mean;
  p.rstd = rstd;
  p.eps = eps;
  p.aligned = x.cols % kVector == 0 && is_aligned(x.data);
  return p;
}

}  // namespace

void normalize_layouts(const LayoutsCast& y, const GroupedView& saved, float* mean, float* rstd,
                       const TensorView& x, const TensorView& weight, const TensorView& bias,
                       float eps, void* stream) {
  const char* op = "normalize_layouts";
  check_normalize_inputs(op, saved, x, weight, bias);
  check_blocks(op, y, x.rows, x.cols);
  if (x.rows == 0) return;
  with_float(x.dtype, [&](auto type) {
    using X = decltype(type);
    Problem<X> p = make_problem<X>(saved, mean, rstd, x, weight, bias, eps);
    p.y = {nullptr, nullptr, {}, DType::e4m3, true, 0};  // what a row's fast path looks at
    p.fast = is_fast(p);
    if (!p.saved.held) save_groups(op, saved, x, stream);
    launch(op, normalize_rows_kernel<X>, row_blocks(x.rows), kThreads, stream, p);
    if (x.cols == 0) return;
    const Targets to = make_targets(y, x.rows, x.cols);
    launch(op, normalize_blocks_kernel<X>, tile_count(to.padded), kThreads, stream, p, to);
  });
}

void normalize(const GemmCast& y, const GroupedView& saved, float* mean, float* rstd,
               const TensorView& x, const TensorView& weight, const TensorView& bias, float eps,
               void* stream) {
  const char* op = "normalize";
  check_normalize(y, saved, x, weight, bias);
  with_float(x.dtype, [&](auto type) {
    using X = decltype(type);
    Problem<X> p = make_problem<X>(saved, mean, rstd, x, weight, bias, eps);
    p.y = device_cast(op, y);
    p.fast = is_fast(p);
    if (!p.saved.held) save_groups(op, saved, x, stream);
    const ScaleMode mode = p.y.scale.mode;
    const int64_t rows = row_blocks(x.rows);
    CastBlocks blocks = cast_blocks(op, mode, p.tiles);
    if (mode == ScaleMode::now) blocks.first = std::min(rows, most_loop_blocks(op));
    if (mode != ScaleMode::now) launch(op, normalize_rows_kernel<X>, rows, kThreads, stream, p);
    cast_in_passes(op, &p.y.scale, blocks, stream, [&](bool first, int64_t count) {
      if (first && mode == ScaleMode::now)
        launch(op, normalize_rows_now_kernel<X>, count, kThreads, stream, p);
      else
        launch(op, normalize_cast_kernel<X>, count, kThreads, stream, p, first);
    });
  });
}

}  // namespace quaver::cuda
