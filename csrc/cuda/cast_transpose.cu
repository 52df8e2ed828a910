// The kernel that casts matrices to FP8 as products read them: q [rows, cols], its transpose qt
// where that is wanted, and the amax, from one read. A block casts a tile, stores its rows directly
// and its columns through shared memory. One launch serves several matrices, because a launch takes
// longer than a small cast.
#include "../arguments.h"
#include "dispatch.h"
#include "quaver/cast.h"
#include "tensor_scale.h"
#include "transpose_tile.h"

namespace quaver::cuda {
namespace {

struct Job {
  uint8_t *q, *qt;  // qt null: none
  const void* x;
  Tiles tiles;
  int64_t tile_count;
  CastBlocks blocks;
  TensorScale scale;
  DType type;
  bool aligned, aligned_t;
};

struct Jobs {
  Job job[kMostJobs];
};

template <class X, class Q>
QUAVER_DEVICE uint32_t cast_tile(const Job& j, int64_t index, Divisor by, Tile& tile) {
  constexpr int kRun = run_length(sizeof(X)), kApart = kRunsApart<kRun>;
  const int64_t row0 = index / j.tiles.across * kTile, col0 = index % j.tiles.across * kTile;
  const TilePlace start = place_in_pass(0, threadIdx.x);
  const int64_t left = j.tiles.rows - row0 - start.row;  // rows from this thread's first on
  const int64_t col = col0 + first_column<kRun>(start), width = j.tiles.cols - col;
  const int64_t first = (row0 + start.row) * j.tiles.cols + col, step = kPassRows * j.tiles.cols;
  const X* x = static_cast<const X*>(j.x) + first;
  Packed<sizeof(X)> loaded[kPasses];  // all loads before the first use
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass)
    loaded[pass] =
        load_runs<kRun>(x + pass * step, kApart, pass * kPassRows < left ? width : 0, j.aligned);
  uint32_t most = 0;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    float v[kVector];
    decode_vector<X>(loaded[pass], v);
    const uint32_t seen = amax_bits(v);
    most = max_bits(most, seen);
    divide(v, by);
    Packed<1> codes;
    encode_vector<Q>(v, codes, is_number(seen) && by.sound);
    store_runs<kRun>(j.q + first + pass * step, codes, kApart, pass * kPassRows < left ? width : 0,
                     j.aligned);
    if (j.qt != nullptr) put_codes<kRun>(tile, place_in_pass(pass, threadIdx.x), codes);
  }
  if (j.qt == nullptr) return most;
  __syncthreads();
  store_transposed(j.qt, tile, j.tiles, row0, col0, threadIdx.x, j.aligned_t);
  return most;
}

template <class X, class Q>
QUAVER_DEVICE uint32_t cast_tiles(const Job& j, int64_t block, int64_t step, Divisor by,
                                  Tile& tile) {
  uint32_t seen = 0;
  for (int64_t index = block;;) {
    seen = max_bits(seen, cast_tile<X, Q>(j, index, by, tile));
    index += step;
    if (index >= j.tile_count) return seen;
    __syncthreads();  // the tile is read
  }
}

template <class X>
__global__ void __launch_bounds__(kThreads)
    cast_kernel(const __grid_constant__ Jobs jobs, bool first) {
  __shared__ Tile tile;
  __shared__ CastPass shared;
  const int64_t before = first ? jobs.job[0].blocks.first : jobs.job[0].blocks.second;
  const bool second = blockIdx.x >= before;
  const int64_t block = blockIdx.x - (second ? before : 0);
  cast_pass(jobs.job[second].scale, first, block, shared);
  const CastPass of = shared;
  if (!of.encode && !of.collect) return;
  const Job j = jobs.job[second];  // in registers: a store could change what lies in memory
  uint32_t seen = 0;
  const int64_t step = first ? j.blocks.first : j.blocks.second;
  if (!of.encode)
    seen = look(static_cast<const X*>(j.x), j.tiles.rows * j.tiles.cols, block, step, j.aligned);
  else if (j.type == DType::e4m3)
    seen = cast_tiles<X, e4m3>(j, block, step, of.by, tile);
  else
    seen = cast_tiles<X, e5m2>(j, block, step, of.by, tile);
  if (of.collect) leave_amax(j.scale, block, seen);
}

Job make_job(const char* op, const MatrixJob& m) {
  const GemmCast& to = m.to;
  Job j = {};
  j.q = to.q.as<uint8_t>();
  j.qt = to.qt.as<uint8_t>();
  j.x = m.x.data;
  j.tiles = make_tiles(m.x.rows, m.x.cols);
  j.tile_count = std::max<int64_t>(1, tile_count(j.tiles));
  j.scale = tensor_scale(op, to.q.dtype, to.scale, to.amax, to.power_of_two, to.source);
  j.blocks = cast_blocks(op, j.scale.mode, j.tile_count);
  if (j.scale.mode == ScaleMode::given) j.blocks.first = 0;
  if (j.scale.mode == ScaleMode::now) j.blocks.first = loop_blocks(op, m.x.numel());
  set_partials(&j.scale, j.blocks);
  j.type = to.q.dtype;
  j.aligned = m.x.cols % kVector == 0 && is_aligned(m.x.data) && is_aligned(to.q.data);
  j.aligned_t = m.x.rows % kVector == 0 && is_aligned(to.qt.data);
  return j;
}

}  // namespace

void cast_matrices(const MatrixJob* matrices, int count, void* stream) {
  const char* op = "cast_transpose";
  if (count == 2 && matrices[0].x.dtype != matrices[1].x.dtype) {
    cast_matrices(matrices, 1, stream);
    return cast_matrices(matrices + 1, 1, stream);
  }
  QUAVER_CHECK(count >= 1 && count <= kMostJobs, op, ": casts 1 to ", kMostJobs, " matrices, got ",
               count);
  Jobs jobs = {};
  CastBlocks all = {};
  for (int i = 0; i < count; ++i) {
    const MatrixJob& m = matrices[i];
    check_cast(op, m.to.q, m.x);
    QUAVER_CHECK(is_fp8(m.to.q.dtype), op, ": dtype must be e4m3 or e5m2, got ",
                 name_of(m.to.q.dtype));
    jobs.job[i] = make_job(op, m);
    all.first += jobs.job[i].blocks.first;
    all.second += jobs.job[i].blocks.second;
  }
  with_float(matrices[0].x.dtype, [&](auto type) {
    using X = decltype(type);
    if (all.first > 0) launch(op, cast_kernel<X>, all.first, kThreads, stream, jobs, true);
    launch(op, cast_kernel<X>, all.second, kThreads, stream, jobs, false);
  });
  for (int i = 0; i < count; ++i) write_amax(op, jobs.job[i].scale, stream);
}

void cast_transpose(const TensorView& q, const TensorView& qt, const TensorView& scale,
                    const TensorView& amax, const TensorView& x, bool power_of_two,
                    const ScaleSource& source, void* stream) {
  check_cast_transpose(q, qt, x, source);
  const MatrixJob job = {{q, qt, scale.as<float>(), amax.as<float>(), power_of_two, source}, x};
  cast_matrices(&job, 1, stream);
}

}  // namespace quaver::cuda
