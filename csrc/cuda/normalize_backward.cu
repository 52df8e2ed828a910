// The gradients of RMSNorm and LayerNorm from the saved FP8 input (quaver/normalize.h). One
// warp a row computes two sums, then dx, for which it keeps the row in registers unless that is too
// long. The gradients of weight and bias are sums over rows in a fixed order, without atomics: each
// thread sums four columns over a piece of rows, and a second kernel sums the pieces of each
// column.
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

// 512 columns of a row as a warp's thread keeps its part of them: as they are stored.
template <class Y>
struct Chunk {
  static constexpr int kRun = run_length(sizeof(Y)), kRuns = kVector / kRun;
  Packed<sizeof(Y)> dy;
  Packed<1> x;
  float scale[kRuns];
};

// Zeros where the row has ended.
template <class Y>
QUAVER_DEVICE Chunk<Y> load_chunk(const Problem& p, int64_t row, int col) {
  constexpr int kRun = Chunk<Y>::kRun;
  const Y* dy = static_cast<const Y*>(p.dy) + row * p.cols;
  const uint8_t *codes = p.x.codes + row * p.cols, *scale = p.x.scale + row * p.x.per_row;
  Chunk<Y> c = {};
#pragma unroll
  for (int r = 0; r < Chunk<Y>::kRuns; ++r) {
    const int at = col + r * kRowRunsApart<kRun>;
    if (at >= p.cols) continue;
    load_words<4>(dy + at, c.dy.word + 4 * r);
    load_words<kRun / 4>(codes + at, c.x.word + r * kRun / 4);
    c.scale[r] = decode_e8m0(scale[at >> p.x.shift]);
  }
  return c;
}

// The place of four weights in shared memory, turned so that eight threads with 8 columns each meet
// in no bank.
QUAVER_DEVICE int place_of_four(int four) { return four ^ (four >> 3 & 1); }

template <class Y>
QUAVER_DEVICE void decode_chunk(const Chunk<Y>& c, const uint4* weights, int col, float mean,
                                float rstd, Values& v) {
  constexpr int kRun = Chunk<Y>::kRun;
  decode_vector<Y>(c.dy, v.g);
  decode_vector<e4m3>(c.x, v.xhat);
#pragma unroll
  for (int k = 0; k < kVector; ++k)
    v.xhat[k] = normalized(v.xhat[k] * c.scale[k / kRun], mean, rstd);
#pragma unroll
  for (int k = 0; k < kVector; k += kQuad) {
    const int at = col + static_cast<int>(place_in_runs<kRun>(k, kRowRunsApart<kRun>));
    const uint4 w = weights[place_of_four(at / kQuad)];
    v.g[k] *= bit_cast<float>(w.x);
    v.g[k + 1] *= bit_cast<float>(w.y);
    v.g[k + 2] *= bit_cast<float>(w.z);
    v.g[k + 3] *= bit_cast<float>(w.w);
  }
}

template <class Y, class X>
QUAVER_DEVICE void store_chunk(const Problem& p, int64_t row, int col, const float (&dx)[kVector]) {
  constexpr int kRun = Chunk<Y>::kRun, kWords = kRun * int(sizeof(X)) / 4;
  Packed<sizeof(X)> packed;
  encode_vector<X>(dx, packed);
  X* to = static_cast<X*>(p.dx) + row * p.cols + col;
#pragma unroll
  for (int r = 0; r < Chunk<Y>::kRuns; ++r)
    if (col + r * kRowRunsApart<kRun> < p.cols)
      store_words<kWords>(to + r * kRowRunsApart<kRun>, packed.word + r * kWords);
}

// Weights of all columns, 1 where there are none. All threads of the block call it.
template <int kChunks>
QUAVER_DEVICE void fill_weights(const Problem& p, uint4 (&weights)[kChunks * kRowLanes / kQuad]) {
  for (int four = threadIdx.x; four < kChunks * kRowLanes / kQuad; four += kThreads) {
    float w[kQuad] = {1.0f, 1.0f, 1.0f, 1.0f};
    const int64_t col = four * kQuad;
    if (p.weight.data != nullptr && col < p.cols)
      decode_any(p.weight.type,
                 load_quad(p.weight.data, p.weight.type, col, p.cols - col, p.weight.aligned), 0,
                 1.0f, w);
    weights[place_of_four(four)] = uint4{bit_cast<uint32_t>(w[0]), bit_cast<uint32_t>(w[1]),
                                         bit_cast<uint32_t>(w[2]), bit_cast<uint32_t>(w[3])};
  }
}

// normalize_backward_kernel for rows of up to kChunks * 512 columns, whose runs are all whole and
// aligned, each in one group.
template <class Y, int kChunks>
__global__ void __launch_bounds__(kThreads, 1) normalize_backward_kept_kernel(Problem p) {
  constexpr int kRun = Chunk<Y>::kRun;
  __shared__ uint4 weights[kChunks * kRowLanes / kQuad];
  fill_weights<kChunks>(p, weights);
  __syncthreads();
  const float count = static_cast<float>(p.cols);
  for (RowPlace at = row_place(); at.row < p.rows; at.row += int64_t(gridDim.x) * kWarps) {
    Chunk<Y> row[kChunks];
#pragma unroll
    for (int k = 0; k < kChunks; ++k)
      row[k] = load_chunk<Y>(p, at.row, k * kRowLanes + at.lane * kRun);
    const float mean = p.mean != nullptr ? p.mean[at.row] : 0.0f, rstd = p.rstd[at.row];
    float lanes_g[kVector] = {}, lanes_g_xhat[kVector] = {};
    Values v;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      if (k > 0 && k * kRowLanes >= p.cols) continue;
      const int col = k * kRowLanes + at.lane * kRun;
      decode_chunk(row[k], weights, col, mean, rstd, v);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (col + place_in_runs<kRun>(j, kRowRunsApart<kRun>) >= p.cols) continue;
        lanes_g[j] += v.g[j];
        lanes_g_xhat[j] += v.g[j] * v.xhat[j];
      }
    }
    NormalizeGradient sums;
    sums.mean_g = p.mean != nullptr ? row_sum<kRun>(lanes_g) / count : 0.0f;
    sums.mean_g_xhat = row_sum<kRun>(lanes_g_xhat) / count;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      if (k > 0 && k * kRowLanes >= p.cols) continue;
      const int col = k * kRowLanes + at.lane * kRun;
      decode_chunk(row[k], weights, col, mean, rstd, v);
      float dx[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) dx[j] = normalize_gradient(v.g[j], v.xhat[j], sums, rstd);
      if (p.dx_type == DType::f32)
        store_chunk<Y, float>(p, at.row, col, dx);
      else if (p.dx_type == DType::f16)
        store_chunk<Y, f16>(p, at.row, col, dx);
      else
        store_chunk<Y, bf16>(p, at.row, col, dx);
    }
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

// Launches the kernel that keeps rows, where they fit into the registers of a warp.
template <class Y>
void launch_rows(const char* op, const Problem& p, void* stream) {
  const int64_t chunks = ceil_div(p.cols, kRowLanes), blocks = row_blocks(p.rows);
  const bool whole = p.aligned && p.aligned_dx && p.x.aligned && p.x.shift >= 4;
  if (!whole || chunks > (sizeof(Y) == 4 ? 4 : 8))
    return launch(op, normalize_backward_kernel<Y>, blocks, kThreads, stream, p);
  const int64_t fit = std::min(blocks, most_loop_blocks(op));
  if (chunks <= 2)
    launch(op, normalize_backward_kept_kernel<Y, 2>, fit, kThreads, stream, p);
  else if (chunks <= 4)
    launch(op, normalize_backward_kept_kernel<Y, 4>, fit, kThreads, stream, p);
  else if constexpr (sizeof(Y) < 4)
    launch(op, normalize_backward_kept_kernel<Y, 8>, fit, kThreads, stream, p);
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
    with_float(dy.dtype, [&](auto type) { launch_rows<decltype(type)>(op, p, stream); });
  if (dweight == nullptr && dbias == nullptr) return;
  if (p.pieces > 0)
    launch(op, normalize_pieces_kernel, ceil_div(p.pieces * ceil_div(p.cols, kQuad), kThreads),
           kThreads, stream, p);
  launch(op, normalize_columns_kernel, ceil_div(p.cols, kThreads), kThreads, stream, p);
}

}  // namespace quaver::cuda
