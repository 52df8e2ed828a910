// The kernels that cast a matrix to the layouts that products read, each with scales of its own:
// 1 x 128 blocks along both, or 128 x 128 tiles, from one read; rows from two. A block of threads
// casts a tile: it stores the rows' codes directly, and the columns' through shared memory.
#include "../check_cast_layouts.h"
#include "layouts.h"

namespace quaver::cuda {
namespace {

struct Job {
  int64_t rows, cols;  // of x
  Targets to;
  bool aligned;
};

template <class X>
constexpr int kRun = run_length(sizeof(X));

template <class X>
QUAVER_DEVICE void load_tile(Packed<sizeof(X)> (&loaded)[kPasses], const Job& job, const X* x,
                             int64_t row0, int64_t col0) {
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const TilePlace at = place_in_pass(pass, threadIdx.x);
    const int64_t row = row0 + at.row, col = col0 + first_column<kRun<X>>(at);
    const int64_t n = row < job.rows ? job.cols - col : 0;
    loaded[pass] =
        load_runs<kRun<X>>(x + row * job.cols + col, kRunsApart<kRun<X>>, n, job.aligned);
  }
}

// The values of a pass, decoded each time: in f32 they would take twice to four times the
// registers.
template <class X>
struct Decoded {
  const Packed<sizeof(X)> (&loaded)[kPasses];
};

template <class X>
QUAVER_DEVICE void get_values(const Decoded<X>& values, int pass, float (&v)[kVector]) {
  decode_vector<X>(values.loaded[pass], v);
}

template <class X, class Q>
__global__ void __launch_bounds__(kThreads) cast_blocks_kernel(const X* x, Job job) {
  __shared__ BlocksMemory memory;
  const int64_t down = int64_t(blockIdx.x) / job.to.padded.across;
  const int64_t along = int64_t(blockIdx.x) % job.to.padded.across;
  Packed<sizeof(X)> loaded[kPasses];
  load_tile<X>(loaded, job, x, down * kTile, along * kTile);
  cast_blocks<kRun<X>, Q>(job.to, Decoded<X>{loaded}, down, along, memory);
}

template <class X, class Q>
__global__ void __launch_bounds__(kThreads) cast_tiles_kernel(const X* x, Job job) {
  __shared__ Tile tile;
  __shared__ float row_scale[kTile];
  __shared__ uint32_t most;
  const Targets& to = job.to;
  const int64_t down = int64_t(blockIdx.x) / to.padded.across;
  const int64_t along = int64_t(blockIdx.x) % to.padded.across;
  Packed<sizeof(X)> loaded[kPasses];
  load_tile<X>(loaded, job, x, down * kTile, along * kTile);
  uint32_t seen = 0;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    float v[kVector];
    decode_vector<X>(loaded[pass], v);
    seen = max_bits(seen, amax_bits(v));
  }
  seen = block_max(seen);
  if (threadIdx.x == 0) {
    most = seen;
    const float scale = written(choose(to, seen), seen);
    if (to.q.codes != nullptr) to.q.scale[down * to.q.per_row + along] = scale;
    if (to.qt.codes != nullptr) to.qt.scale[along * to.qt.per_row + down] = scale;
  }
  __syncthreads();
  if (threadIdx.x < kTile) row_scale[threadIdx.x] = choose(to, most);
  __syncthreads();
  encode_rows<kRun<X>, Q>(to, Decoded<X>{loaded}, row_scale, down * kTile, along * kTile, &tile);
  if (to.qt.codes == nullptr) return;
  __syncthreads();
  store_transposed(to.qt.codes, tile, to.padded, down * kTile, along * kTile, threadIdx.x,
                   to.qt.aligned);
}

// The amaxes of rows, gathered where their scales will be.
template <class X>
__global__ void __launch_bounds__(kThreads) measure_rows_kernel(const X* x, Job job) {
  __shared__ Amaxes amax;
  __shared__ WarpMaxima maxima;
  const Targets& to = job.to;
  const int64_t row0 = int64_t(blockIdx.x) / to.padded.across * kTile;
  const int64_t col0 = int64_t(blockIdx.x) % to.padded.across * kTile;
  Packed<sizeof(X)> loaded[kPasses];
  load_tile<X>(loaded, job, x, row0, col0);
  measure<kRun<X>>(amax, maxima, Decoded<X>{loaded}, to.qt.codes != nullptr);
  if (threadIdx.x >= kTile) return;
  const int64_t row = row0 + threadIdx.x, col = col0 + threadIdx.x;
  if (to.q.codes != nullptr && row < job.rows)
    atomicMax(reinterpret_cast<uint32_t*>(to.q.scale + row), amax.row[threadIdx.x]);
  if (to.qt.codes != nullptr && col < job.cols)
    atomicMax(reinterpret_cast<uint32_t*>(to.qt.scale + col), amax.col[swizzled(threadIdx.x)]);
}

template <class X, class Q>
__global__ void __launch_bounds__(kThreads) cast_rows_kernel(const X* x, Job job) {
  __shared__ Tile tile;
  __shared__ float row_scale[kTile];
  __shared__ ColumnScales col_scale;
  const Targets& to = job.to;
  const int64_t row0 = int64_t(blockIdx.x) / to.padded.across * kTile;
  const int64_t col0 = int64_t(blockIdx.x) % to.padded.across * kTile;
  Packed<sizeof(X)> loaded[kPasses];
  load_tile<X>(loaded, job, x, row0, col0);
  if (threadIdx.x < kTile) {
    const int64_t row = row0 + threadIdx.x, col = col0 + threadIdx.x;
    const bool has_row = to.q.codes != nullptr && row < to.padded.rows;
    const bool has_col = to.qt.codes != nullptr && col < to.padded.cols;
    row_scale[threadIdx.x] = has_row ? choose(to, bit_cast<uint32_t>(to.q.scale[row])) : 1.0f;
    col_scale.of[swizzled(threadIdx.x)] =
        has_col ? choose(to, bit_cast<uint32_t>(to.qt.scale[col])) : 1.0f;
  }
  __syncthreads();
  const Decoded<X> values{loaded};
  if (to.q.codes != nullptr) encode_rows<kRun<X>, Q>(to, values, row_scale, row0, col0, nullptr);
  if (to.qt.codes == nullptr) return;
  encode_columns<kRun<X>, Q>(to, values, col_scale, false, tile);
  __syncthreads();
  store_transposed(to.qt.codes, tile, to.padded, row0, col0, threadIdx.x, to.qt.aligned);
}

// Amaxes to scales, in place.
__global__ void __launch_bounds__(kThreads)
    write_row_scales_kernel(float* scales, int64_t count, Job job) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const uint32_t amax = bit_cast<uint32_t>(scales[i]);
  scales[i] = written(choose(job.to, amax), amax);
}

template <class X, class Q>
void run(const LayoutsCast& to, const TensorView& values, const Job& job, void* stream) {
  const char* op = "cast_layouts";
  const int64_t tiles = tile_count(job.to.padded);
  const X* x = values.as<const X>();
  if (to.grain == Grain::block)
    return launch(op, cast_blocks_kernel<X, Q>, tiles, kThreads, stream, x, job);
  if (to.grain == Grain::tile)
    return launch(op, cast_tiles_kernel<X, Q>, tiles, kThreads, stream, x, job);
  for (const Operand* o : {&to.q, &to.qt})
    if (o->wanted()) clear(op, o->scale.data, o->scale.numel() * int64_t(sizeof(float)), stream);
  if (tiles > 0) {
    launch(op, measure_rows_kernel<X>, tiles, kThreads, stream, x, job);
    launch(op, cast_rows_kernel<X, Q>, tiles, kThreads, stream, x, job);
  }
  for (const Operand* o : {&to.q, &to.qt})
    if (o->wanted() && o->scale.numel() > 0)
      launch(op, write_row_scales_kernel, ceil_div(o->scale.numel(), kThreads), kThreads, stream,
             o->scale.as<float>(), o->scale.numel(), job);
}

}  // namespace

void cast_layouts(const LayoutsCast& to, const TensorView& x, void* stream) {
  check_cast_layouts(to, x);
  // Rows without values have scales, too.
  if (!(to.q.wanted() || to.qt.wanted()) || (x.numel() == 0 && to.grain != Grain::row)) return;
  const Job job = {x.rows, x.cols, make_targets(to, x.rows, x.cols),
                   x.cols % kVector == 0 && is_aligned(x.data)};
  with_float(x.dtype, [&](auto from) {
    with_code(job.to.type, [&](auto code) {
      using X = decltype(from);
      using Q = decltype(code);
      if constexpr (sizeof(Q) == 1) run<X, Q>(to, x, job, stream);
    });
  });
}

}  // namespace quaver::cuda
