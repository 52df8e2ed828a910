// The kernels that cast a matrix to the layouts that products read, each with scales of its own:
// 1 x 128 blocks along both, or 128 x 128 tiles, from one read; rows from two. A block of threads
// casts a tile: it stores the rows' codes directly, and the columns' through shared memory.
#include "../check_cast_layouts.h"
#include "cast_tile.h"

namespace quaver::cuda {
namespace {

struct Job {
  int64_t rows, cols;  // of x
  Targets to;
  bool aligned;
};

template <class X>
QUAVER_DEVICE void load(Packed<sizeof(X)> (&loaded)[kPasses], const Job& job, const X* x,
                        int64_t row0, int64_t col0) {
  load_tile(loaded, x, job.rows, job.cols, row0, col0, job.aligned);
}

template <class X, class Q>
__global__ void __launch_bounds__(kThreads) cast_blocks_kernel(const X* x, Job job) {
  __shared__ BlocksMemory memory;
  const int64_t down = int64_t(blockIdx.x) / job.to.padded.across;
  const int64_t along = int64_t(blockIdx.x) % job.to.padded.across;
  Packed<sizeof(X)> loaded[kPasses];
  load(loaded, job, x, down * kTile, along * kTile);
  cast_blocks<kRunOf<X>, Q>(job.to, Decoded<X>{loaded}, down, along, memory);
}

template <class X, class Q>
__global__ void __launch_bounds__(kThreads) cast_tiles_kernel(const X* x, Job job) {
  __shared__ OneMemory memory;
  __shared__ uint32_t most;
  const Targets& to = job.to;
  const int64_t down = int64_t(blockIdx.x) / to.padded.across;
  const int64_t along = int64_t(blockIdx.x) % to.padded.across;
  Packed<sizeof(X)> loaded[kPasses];
  load(loaded, job, x, down * kTile, along * kTile);
  const Decoded<X> values{loaded};
  const uint32_t seen = block_max(largest_of(values));
  if (threadIdx.x == 0) {
    most = seen;
    const float scale = written(choose(to, seen), seen);
    if (to.q.codes != nullptr) to.q.scale[down * to.q.per_row + along] = scale;
    if (to.qt.codes != nullptr) to.qt.scale[along * to.qt.per_row + down] = scale;
  }
  __syncthreads();
  cast_by_one<X, Q>(to, values, down * kTile, along * kTile, choose(to, most), memory);
}

// The amaxes of rows, gathered where their scales will be.
template <class X>
__global__ void __launch_bounds__(kThreads) measure_rows_kernel(const X* x, Job job) {
  __shared__ Amaxes amax;
  __shared__ WarpMaxima maxima;
  const int64_t row0 = int64_t(blockIdx.x) / job.to.padded.across * kTile;
  const int64_t col0 = int64_t(blockIdx.x) % job.to.padded.across * kTile;
  Packed<sizeof(X)> loaded[kPasses];
  load(loaded, job, x, row0, col0);
  gather_amaxes<X>(job.to, {loaded}, row0, col0, amax, maxima);
}

template <class X, class Q>
__global__ void __launch_bounds__(kThreads) cast_rows_kernel(const X* x, Job job) {
  __shared__ BlocksMemory memory;
  const int64_t row0 = int64_t(blockIdx.x) / job.to.padded.across * kTile;
  const int64_t col0 = int64_t(blockIdx.x) % job.to.padded.across * kTile;
  Packed<sizeof(X)> loaded[kPasses];
  load(loaded, job, x, row0, col0);
  read_scales(job.to, row0, col0, memory);
  encode_both<kRunOf<X>, Q>(job.to, Decoded<X>{loaded}, row0, col0, false, memory);
}

// Amaxes to scales, in place.
__global__ void __launch_bounds__(kThreads)
    write_row_scales_kernel(float* scales, int64_t count, Job job) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) write_scale(job.to, scales + i);
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
