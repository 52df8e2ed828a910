// The gradients of RMSNorm and LayerNorm from the saved FP8 input (quaver/normalize.h). One
// warp a row computes two sums, then dx. The gradients of weight and bias are sums over rows in a
// fixed order, without atomics: each thread sums four columns over a piece of rows, and a second
// kernel sums the pieces of each column.
#include "../arguments.h"
#include "dispatch.h"
#include "row_sum.h"

namespace quaver::cuda {
namespace {

struct Problem {
  int64_t rows, cols;
  DeviceGroups x;
  const void* dy;
  DType dy_type;
  const float *mean, *rstd;  // mean null: RMSNorm
  DeviceChannels weight;
  void* dx;
  DType dx_type;
  float *dweight, *dbias;            // null: not wanted
  float *piece_weight, *piece_bias;  // [pieces, cols]
  int64_t pieces;
  bool aligned, aligned_dx;
};

struct Values {
  float g[kVector], xhat[kVector];
};

template <class Y>
QUAVER_DEVICE void load_values(const Problem& p, int64_t row, int64_t col, int64_t n, float mean,
                               float rstd, Values& v) {
  const Y* dy = static_cast<const Y*>(p.dy) + row * p.cols + col;
  constexpr int kRun = run_length(sizeof(Y)), kApart = kRowRunsApart<kRun>;
  decode_vector<Y>(load_runs<kRun>(dy, kApart, n, p.aligned), v.g);
  load_vector<kRun>(p.x, row, col, kApart, n, v.xhat);
#pragma unroll
  for (int k = 0; k < kVector; ++k) v.xhat[k] = normalized(v.xhat[k], mean, rstd);
  if (p.weight.data != nullptr) {
    float w[kVector];
    load_channels<kRun>(p.weight, col, kApart, n, w);
#pragma unroll
    for (int k = 0; k < kVector; ++k) v.g[k] *= w[k];
  }
}

template <class Y, class X>
QUAVER_DEVICE void store_dx(const Problem& p, int64_t at, int64_t n, const float (&dx)[kVector]) {
  constexpr int kRun = run_length(sizeof(Y));
  Packed<sizeof(X)> packed;
  encode_vector<X>(dx, packed);
  store_runs<kRun>(static_cast<X*>(p.dx) + at, packed, kRowRunsApart<kRun>, n, p.aligned_dx);
}

template <class Y>
__global__ void __launch_bounds__(kThreads) normalize_backward_kernel(Problem p) {
  constexpr int kRun = run_length(sizeof(Y));
  const RowPlace at = row_place();
  if (at.row >= p.rows) return;  // whole warps
  const float mean = p.mean != nullptr ? p.mean[at.row] : 0.0f, rstd = p.rstd[at.row];
  const float count = static_cast<float>(p.cols);
  float lanes_g[kVector] = {}, lanes_g_xhat[kVector] = {};
  for (int64_t col = at.lane * kRun; col < p.cols; col += kRowLanes) {
    Values v;
    load_values<Y>(p, at.row, col, p.cols - col, mean, rstd, v);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      if (place_in_runs<kRun>(k, kRowRunsApart<kRun>) >= p.cols - col) continue;
      lanes_g[k] += v.g[k];
      lanes_g_xhat[k] += v.g[k] * v.xhat[k];
    }
  }
  NormalizeGradient sums;
  sums.mean_g = p.mean != nullptr ? row_sum<kRun>(lanes_g) / count : 0.0f;
  sums.mean_g_xhat = row_sum<kRun>(lanes_g_xhat) / count;
  for (int64_t col = at.lane * kRun; col < p.cols; col += kRowLanes) {
    Values v;
    load_values<Y>(p, at.row, col, p.cols - col, mean, rstd, v);
    float dx[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) dx[k] = normalize_gradient(v.g[k], v.xhat[k], sums, rstd);
    const int64_t first = at.row * p.cols + col, n = p.cols - col;
    if (p.dx_type == DType::f32)
      store_dx<Y, float>(p, first, n, dx);
    else if (p.dx_type == DType::f16)
      store_dx<Y, f16>(p, first, n, dx);
    else
      store_dx<Y, bf16>(p, first, n, dx);
  }
}

// Each thread sums four columns of one piece of rows.
__global__ void __launch_bounds__(kThreads) normalize_pieces_kernel(Problem p) {
  const int64_t across = ceil_div(p.cols, kQuad);
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t piece = index / across, col = index % across * kQuad;
  if (piece >= p.pieces) return;
  const int64_t n = p.cols - col;
  const int64_t begin = piece * kRowPiece;
  const int64_t end = begin + kRowPiece < p.rows ? begin + kRowPiece : p.rows;
  int64_t group[kQuad];
#pragma unroll
  for (int k = 0; k < kQuad; ++k) group[k] = group_of(p.x, col + k);
  float dweight[kQuad] = {}, dbias[kQuad] = {};
#pragma unroll 4
  for (int64_t row = begin; row < end; ++row) {
    float dy[kQuad], x[kQuad];
    decode_any(p.dy_type, load_quad(p.dy, p.dy_type, row * p.cols + col, n, p.aligned), 0, 1.0f,
               dy);
    decode_quad<e4m3>(load_quad(p.x.codes, DType::e4m3, row * p.cols + col, n, p.x.aligned), 0, x);
    const float mean = p.mean != nullptr ? p.mean[row] : 0.0f, rstd = p.rstd[row];
    const uint8_t* scale = p.x.scale + row * p.x.per_row;
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      if (k >= n) continue;
      dweight[k] += dy[k] * normalized(x[k] * decode_e8m0(scale[group[k]]), mean, rstd);
      dbias[k] += dy[k];
    }
  }
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    if (k >= n) continue;
    if (p.dweight != nullptr) p.piece_weight[piece * p.cols + col + k] = dweight[k];
    if (p.dbias != nullptr) p.piece_bias[piece * p.cols + col + k] = dbias[k];
  }
}

QUAVER_DEVICE float sum_pieces(const float* partial, int64_t pieces, int64_t cols) {
  float strands[kRowStrands] = {};
  for (int64_t piece = 0; piece < pieces; piece += kRowStrands) {
#pragma unroll
    for (int k = 0; k < kRowStrands; ++k)
      if (piece + k < pieces) strands[k] += partial[(piece + k) * cols];
  }
#pragma unroll
  for (int half = kRowStrands / 2; half > 0; half /= 2)
#pragma unroll
    for (int k = 0; k < half; ++k) strands[k] += strands[k + half];
  return strands[0];
}

__global__ void __launch_bounds__(kThreads) normalize_columns_kernel(Problem p) {
  const int64_t col = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (col >= p.cols) return;
  if (p.dweight != nullptr) p.dweight[col] = sum_pieces(p.piece_weight + col, p.pieces, p.cols);
  if (p.dbias != nullptr) p.dbias[col] = sum_pieces(p.piece_bias + col, p.pieces, p.cols);
}

}  // namespace

int64_t normalize_backward_workspace_bytes(int64_t rows, int64_t cols) {
  return 2 * row_pieces(rows) * cols * int64_t(sizeof(float));
}

void normalize_backward(const TensorView& dx, float* dweight, float* dbias, const TensorView& dy,
                        const GroupedView& x, const float* mean, const float* rstd,
                        const TensorView& weight, void* workspace, void* stream) {
  const char* op = "normalize_backward";
  check_normalize_backward(dx, dy, x, weight);
  Problem p;
  p.rows = dy.rows;
  p.cols = dy.cols;
  p.x = device_groups(x, 0);
  p.dy = dy.data;
  p.dy_type = dy.dtype;
  p.mean = mean;
  p.rstd = rstd;
  p.weight = device_channels(weight);
  p.dx = dx.data;
  p.dx_type = dx.dtype;
  p.dweight = dweight;
  p.dbias = dbias;
  p.pieces = row_pieces(dy.rows);
  p.piece_weight = static_cast<float*>(workspace);
  p.piece_bias = p.piece_weight + p.pieces * p.cols;
  p.aligned = dy.cols % kVector == 0 && is_aligned(dy.data);
  p.aligned_dx = dy.cols % kVector == 0 && is_aligned(dx.data);
  if (p.cols == 0) return;
  if (p.rows > 0)
    with_float(dy.dtype, [&](auto type) {
      launch(op, normalize_backward_kernel<decltype(type)>, row_blocks(p.rows), kThreads, stream,
             p);
    });
  if (dweight == nullptr && dbias == nullptr) return;
  if (p.pieces > 0)
    launch(op, normalize_pieces_kernel, ceil_div(p.pieces * ceil_div(p.cols, kQuad), kThreads),
           kThreads, stream, p);
  launch(op, normalize_columns_kernel, ceil_div(p.cols, kThreads), kThreads, stream, p);
}

}  // namespace quaver::cuda
