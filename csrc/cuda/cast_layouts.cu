// The kernels that cast a matrix to the layouts that products read, each with scales of its own:
// 1 x 128 blocks along both, or 128 x 128 tiles, from one read; rows from two. A block of threads
// casts a tile: it stores the rows' codes directly, and the columns' through shared memory.
#include "../check_cast_layouts.h"
#include "dispatch.h"
#include "quaver/cast_layouts.h"
#include "transpose_tile.h"

namespace quaver::cuda {
namespace {

static_assert(kTile == kScaleTile, "a block of threads casts the values of a scale");

// One layout as the kernels write it.
struct Target {
  uint8_t* codes;
  float* scale;
  int64_t per_row;  // scales
  bool aligned;
};

struct Job {
  int64_t rows, cols;  // of x
  Tiles padded;        // of q
  Target q, qt;
  float finite_max;
  bool power_of_two, aligned;
};

struct Amaxes {
  uint32_t row[kTile], col[kTile];
};

template <class X>
constexpr int kRun = run_length(sizeof(X));

// The part of a row that a thread has in one pass.
struct Part {
  TilePlace at;
  int64_t row, col, n;  // n: values inside of x
};

template <int kRun>
QUAVER_DEVICE Part part_of(const Job& job, int64_t row0, int64_t col0, int pass) {
  const TilePlace at = place_in_pass(pass, threadIdx.x);
  const int64_t row = row0 + at.row, col = col0 + first_column<kRun>(at);
  return {at, row, col, row < job.rows ? job.cols - col : 0};
}

// The column in the tile of element i of a thread.
template <class X>
QUAVER_DEVICE int column(int chunk, int i) {
  return chunk * kRun<X> + int(place_in_runs<kRun<X>>(i, kRunsApart<kRun<X>>));
}

template <class X>
QUAVER_DEVICE void load_tile(Packed<sizeof(X)> (&loaded)[kPasses], const Job& job, const X* x,
                             int64_t row0, int64_t col0) {
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const Part p = part_of<kRun<X>>(job, row0, col0, pass);
    loaded[pass] =
        load_runs<kRun<X>>(x + p.row * job.cols + p.col, kRunsApart<kRun<X>>, p.n, job.aligned);
  }
}

// The amax of each row and column of the tile, in shared memory.
template <class X>
QUAVER_DEVICE void measure(Amaxes& amax, const Packed<sizeof(X)> (&loaded)[kPasses]) {
  if (threadIdx.x < kTile) amax.col[threadIdx.x] = 0;
  __syncthreads();
  uint32_t most[kVector] = {};
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    float v[kVector];
    decode_vector<X>(loaded[pass], v);
    const TilePlace at = place_in_pass(pass, threadIdx.x);
    const uint32_t row = group_max(amax_bits(v), kChunks);
    if (at.chunk == 0) amax.row[at.row] = row;
#pragma unroll
    for (int i = 0; i < kVector; ++i) most[i] = max_bits(most[i], magnitude_bits(v[i]));
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    for (int distance = kChunks; distance < kWarp; distance *= 2)
      most[i] = max_bits(most[i], __shfl_xor_sync(kAllLanes, most[i], distance));
    if (threadIdx.x % kWarp < kChunks)
      atomicMax(&amax.col[column<X>(threadIdx.x % kChunks, i)], most[i]);
  }
  __syncthreads();
}

// The scale that encodes values of this amax; the written one is NaN where they are not finite.
QUAVER_DEVICE float choose(const Job& job, uint32_t amax_bits) {
  return scale_from_amax(bit_cast<float>(amax_bits), job.finite_max, job.power_of_two);
}

QUAVER_DEVICE float written(float scale, uint32_t amax_bits) {
  return nan_unless_finite(scale, bit_cast<float>(amax_bits));
}

// Codes of the tile by a scale for each row.
template <class X, class Q>
QUAVER_DEVICE void encode_rows(const Job& job, const Packed<sizeof(X)> (&loaded)[kPasses],
                               const float* scale, int64_t row0, int64_t col0, Tile* tile) {
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const Part p = part_of<kRun<X>>(job, row0, col0, pass);
    float v[kVector];
    decode_vector<X>(loaded[pass], v);
    divide(v, divisor(scale[p.at.row]));
    Packed<1> codes;
    encode_vector<Q>(v, codes);
    const int64_t n = p.row < job.padded.rows ? job.padded.cols - p.col : 0;
    if (job.q.codes != nullptr)
      store_runs<kRun<X>>(job.q.codes + p.row * job.padded.cols + p.col, codes, kRunsApart<kRun<X>>,
                          n, job.q.aligned);
    if (tile != nullptr) put_codes<kRun<X>>(*tile, p.at, codes);
  }
}

// Codes by a scale for each column, into shared memory.
template <class X, class Q>
QUAVER_DEVICE void encode_columns(const Packed<sizeof(X)> (&loaded)[kPasses], const float* scale,
                                  Tile& tile) {
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const TilePlace at = place_in_pass(pass, threadIdx.x);
    float v[kVector];
    decode_vector<X>(loaded[pass], v);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = v[i] / scale[column<X>(at.chunk, i)];
    Packed<1> codes;
    encode_vector<Q>(v, codes);
    put_codes<kRun<X>>(tile, at, codes);
  }
}

// Chooses and writes the scales of a layout's 1 x 128 blocks in the tile whose first row there is
// `row0` and whose column of scales is `place`.
QUAVER_DEVICE void choose_blocks(const Job& job, const Target& to, const uint32_t* amax,
                                 float* scale, int64_t row0, int64_t rows, int64_t place) {
  if (threadIdx.x >= kTile) return;
  scale[threadIdx.x] = choose(job, amax[threadIdx.x]);
  const int64_t row = row0 + threadIdx.x;
  if (to.codes != nullptr && row < rows)
    to.scale[row * to.per_row + place] = written(scale[threadIdx.x], amax[threadIdx.x]);
}

template <class X, class Q>
__global__ void __launch_bounds__(kThreads) cast_blocks_kernel(const X* x, Job job) {
  __shared__ Tile tile;
  __shared__ Amaxes amax;
  __shared__ float row_scale[kTile], col_scale[kTile];
  const int64_t down = int64_t(blockIdx.x) / job.padded.across;
  const int64_t along = int64_t(blockIdx.x) % job.padded.across;
  Packed<sizeof(X)> loaded[kPasses];
  load_tile<X>(loaded, job, x, down * kTile, along * kTile);
  measure<X>(amax, loaded);
  choose_blocks(job, job.q, amax.row, row_scale, down * kTile, job.padded.rows, along);
  choose_blocks(job, job.qt, amax.col, col_scale, along * kTile, job.padded.cols, down);
  __syncthreads();
  if (job.q.codes != nullptr)
    encode_rows<X, Q>(job, loaded, row_scale, down * kTile, along * kTile, nullptr);
  if (job.qt.codes == nullptr) return;
  encode_columns<X, Q>(loaded, col_scale, tile);
  __syncthreads();
  store_transposed(job.qt.codes, tile, job.padded, down * kTile, along * kTile, threadIdx.x,
                   job.qt.aligned);
}

template <class X, class Q>
__global__ void __launch_bounds__(kThreads) cast_tiles_kernel(const X* x, Job job) {
  __shared__ Tile tile;
  __shared__ float row_scale[kTile];
  __shared__ uint32_t most;
  const int64_t down = int64_t(blockIdx.x) / job.padded.across;
  const int64_t along = int64_t(blockIdx.x) % job.padded.across;
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
    const float scale = written(choose(job, seen), seen);
    if (job.q.codes != nullptr) job.q.scale[down * job.q.per_row + along] = scale;
    if (job.qt.codes != nullptr) job.qt.scale[along * job.qt.per_row + down] = scale;
  }
  __syncthreads();
  if (threadIdx.x < kTile) row_scale[threadIdx.x] = choose(job, most);
  __syncthreads();
  encode_rows<X, Q>(job, loaded, row_scale, down * kTile, along * kTile, &tile);
  if (job.qt.codes == nullptr) return;
  __syncthreads();
  store_transposed(job.qt.codes, tile, job.padded, down * kTile, along * kTile, threadIdx.x,
                   job.qt.aligned);
}

// The amaxes of rows, gathered where their scales will be.
template <class X>
__global__ void __launch_bounds__(kThreads) measure_rows_kernel(const X* x, Job job) {
  __shared__ Amaxes amax;
  const int64_t row0 = int64_t(blockIdx.x) / job.padded.across * kTile;
  const int64_t col0 = int64_t(blockIdx.x) % job.padded.across * kTile;
  Packed<sizeof(X)> loaded[kPasses];
  load_tile<X>(loaded, job, x, row0, col0);
  measure<X>(amax, loaded);
  if (threadIdx.x >= kTile) return;
  const int64_t row = row0 + threadIdx.x, col = col0 + threadIdx.x;
  if (job.q.codes != nullptr && row < job.rows)
    atomicMax(reinterpret_cast<uint32_t*>(job.q.scale + row), amax.row[threadIdx.x]);
  if (job.qt.codes != nullptr && col < job.cols)
    atomicMax(reinterpret_cast<uint32_t*>(job.qt.scale + col), amax.col[threadIdx.x]);
}

template <class X, class Q>
__global__ void __launch_bounds__(kThreads) cast_rows_kernel(const X* x, Job job) {
  __shared__ Tile tile;
  __shared__ float row_scale[kTile], col_scale[kTile];
  const int64_t row0 = int64_t(blockIdx.x) / job.padded.across * kTile;
  const int64_t col0 = int64_t(blockIdx.x) % job.padded.across * kTile;
  Packed<sizeof(X)> loaded[kPasses];
  load_tile<X>(loaded, job, x, row0, col0);
  if (threadIdx.x < kTile) {
    const int64_t row = row0 + threadIdx.x, col = col0 + threadIdx.x;
    const bool has_row = job.q.codes != nullptr && row < job.padded.rows;
    const bool has_col = job.qt.codes != nullptr && col < job.padded.cols;
    row_scale[threadIdx.x] = has_row ? choose(job, bit_cast<uint32_t>(job.q.scale[row])) : 1.0f;
    col_scale[threadIdx.x] = has_col ? choose(job, bit_cast<uint32_t>(job.qt.scale[col])) : 1.0f;
  }
  __syncthreads();
  if (job.q.codes != nullptr) encode_rows<X, Q>(job, loaded, row_scale, row0, col0, nullptr);
  if (job.qt.codes == nullptr) return;
  encode_columns<X, Q>(loaded, col_scale, tile);
  __syncthreads();
  store_transposed(job.qt.codes, tile, job.padded, row0, col0, threadIdx.x, job.qt.aligned);
}

// Amaxes to scales, in place.
__global__ void __launch_bounds__(kThreads)
    write_row_scales_kernel(float* scales, int64_t count, Job job) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const uint32_t amax = bit_cast<uint32_t>(scales[i]);
  scales[i] = written(choose(job, amax), amax);
}

template <class X, class Q>
void run(const LayoutsCast& to, const TensorView& values, const Job& job, void* stream) {
  const char* op = "cast_layouts";
  const int64_t tiles = tile_count(job.padded);
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

Target target(const Operand& o, const Layout& layout) {
  if (!o.wanted()) return {nullptr, nullptr, 0, false};
  return {o.codes.as<uint8_t>(), o.scale.as<float>(), layout.scales_in_row(o.codes.cols),
          is_aligned(o.codes.data)};
}

}  // namespace

void cast_layouts(const LayoutsCast& to, const TensorView& x, void* stream) {
  check_cast_layouts(to, x);
  // Rows without values have scales, too.
  if (!(to.q.wanted() || to.qt.wanted()) || (x.numel() == 0 && to.grain != Grain::row)) return;
  const DType type = to.q.wanted() ? to.q.codes.dtype : to.qt.codes.dtype;
  const Job job = {x.rows,
                   x.cols,
                   make_tiles(gemm_padded(x.rows), gemm_padded(x.cols)),
                   target(to.q, to.layout()),
                   target(to.qt, to.layout()),
                   scale_max(type),
                   to.power_of_two,
                   x.cols % kVector == 0 && is_aligned(x.data)};
  with_float(x.dtype, [&](auto from) {
    with_code(type, [&](auto code) {
      using X = decltype(from);
      using Q = decltype(code);
      if constexpr (sizeof(Q) == 1) run<X, Q>(to, x, job, stream);
    });
  });
}

}  // namespace quaver::cuda
