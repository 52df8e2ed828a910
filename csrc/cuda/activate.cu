// SwiGLU, GeGLU and plain activations, cast to both GEMM layouts from registers
// (quaver/activate.h). A block computes a tile, stores its rows at once, and its columns through
// shared memory. The pass that collects the amax also saves the copies of x and up. COAT's Group
// Scaling (arXiv 2410.19313, section 4.3) would read the group maxima of the result instead, but
// they cost the same pass here, which is also the one that saves.
#include "../arguments.h"
#include "../check_cast_layouts.h"
#include "dispatch.h"
#include "fused_cast.h"
#include "layouts.h"
#include "quaver/activate.h"

namespace quaver::cuda {
namespace {

// Problems that a fast path is compiled for: with up, and without.
enum class Shape : uint8_t { any, plain, gated };

template <class X>
struct Problem {
  Matrix m;
  int64_t tiles;
  DeviceCast y;
  DeviceGroups x_saved, up_saved;
  const X *x, *up;  // up null: none
  int64_t pitch, up_pitch;
  const float* channel_scale;
  float* channel_amax;
  bool aligned, aligned_scale;
  Shape shape;
};

// What a fast path knows of a problem.
template <Shape shape, class X>
QUAVER_DEVICE Problem<X> with_known(Problem<X> p) {
  if (shape == Shape::any) return p;
  p.y = as_aligned<DType::e4m3>(p.y);
  p.x_saved = as_tile_wide(p.x_saved);
  p.up_saved = as_tile_wide(p.up_saved);
  p.channel_scale = nullptr;
  p.aligned = true;
  return p;
}

template <class X>
Shape shape_of(const Problem<X>& p) {
  const bool known = p.aligned && p.y.aligned && p.y.type == DType::e4m3 &&
                     p.channel_scale == nullptr && are_tile_wide(p.x_saved);
  if (!known || (p.up != nullptr && !are_tile_wide(p.up_saved))) return Shape::any;
  return p.up != nullptr ? Shape::gated : Shape::plain;
}

// The largest |v| of a tile's columns.
struct Columns {
  uint32_t bits[kTile];
};

template <int kRun>
QUAVER_DEVICE void scale_channels(const float* channel_scale, bool aligned, Columns* columns,
                                  const Fragment<kRun>& p, float (&v)[kVector]) {
  if (columns != nullptr) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int64_t at = place_in_runs<kRun>(i, kRunsApart<kRun>);
      if (at < p.n) atomicMax(&columns->bits[first_column<kRun>(p.at) + at], magnitude_bits(v[i]));
    }
  }
  float scale[kVector];
  decode_vector<float>(load_runs<kRun>(channel_scale + p.col, kRunsApart<kRun>, p.n, aligned),
                       scale);
#pragma unroll
  for (int i = 0; i < kVector; ++i) v[i] *= scale[i];
}

// Computes what a thread has in one pass over a tile, and saves its inputs where that is asked for;
// a fast path takes all values for numbers.
template <class X, Shape shape>
QUAVER_DEVICE void activate_values(const Problem<X>& p, Activation kind,
                                   const Fragment<run_length(sizeof(X))>& at, bool save,
                                   Columns* columns, float (&v)[kVector]) {
  constexpr int kRun = run_length(sizeof(X)), kApart = kRunsApart<kRun>;
  constexpr bool kFast = shape != Shape::any;
  const bool gated = kFast ? shape == Shape::gated : p.up != nullptr;
  const X* from = p.x + at.row * p.pitch + at.col;
  decode_vector<X>(load_runs<kRun>(from, kApart, at.n, p.aligned), v);
  Packed<sizeof(X)> up = {};
  if (gated) {
    const X* up_from = p.up + at.row * p.up_pitch + at.col;
    up = load_runs<kRun>(up_from, kApart, at.n, p.aligned);
  }
  if (save && p.x_saved.held) save_vector<kRun, kFast>(p.x_saved, at.row, at.col, kApart, at.n, v);
  with_kind_of_all(kind, [&](auto constant) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) v[k] = quaver::activate<decltype(constant)::value>(v[k]);
  });
  if (gated) {
    float u[kVector];
    decode_vector<X>(up, u);
    if (save && p.up_saved.held)
      save_vector<kRun, kFast>(p.up_saved, at.row, at.col, kApart, at.n, u);
#pragma unroll
    for (int k = 0; k < kVector; ++k) v[k] *= u[k];
  }
  if (p.channel_scale != nullptr) scale_channels(p.channel_scale, p.aligned_scale, columns, at, v);
}

// The values of one pass, cast to q and, in shared memory, for qt. Returns the largest magnitude.
template <class X, Activation kind, Shape shape>
QUAVER_DEVICE uint32_t activate_pass(const Problem<X>& any, Corner corner, int pass, CastPass of,
                                     Columns* columns, Tile& tile) {
  constexpr int kRun = run_length(sizeof(X));
  constexpr bool kFast = shape != Shape::any;
  const Problem<X> p = with_known<shape>(any);
  Fragment<kRun> at = fragment_in_pass<kRun>(p.m, corner, pass);
  if (kFast) {
    of = {true, true, of.scale, as_multiplication(of.by)};
    at = as_inside(at);
  }
  float v[kVector];
  activate_values<X, shape>(p, kind, at, of.collect, columns, v);
  const uint32_t seen = amax_bits(v);
  if (of.encode) put_values(p.y, tile, at, v, kFast ? 0 : seen, of.by);
  return seen;
}

// Returns the largest magnitude of a tile.
template <class X, Activation kind>
QUAVER_DEVICE uint32_t activate_tile(const Problem<X>& p, Corner corner, const CastPass& of,
                                     Columns* columns, Tile& tile) {
  const bool fast =
      p.shape != Shape::any && of.encode && of.collect && !of.by.divide && is_inside(p.m, corner);
  uint32_t most = 0;
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t seen = 0;
    if (fast)
      seen = p.shape == Shape::gated
                 ? activate_pass<X, kind, Shape::gated>(p, corner, pass, of, nullptr, tile)
                 : activate_pass<X, kind, Shape::plain>(p, corner, pass, of, nullptr, tile);
    // Of an input that is NaN the result is too.
    if (!fast || !is_number(__reduce_max_sync(kAllLanes, seen)))
      seen = activate_pass<X, kind, Shape::any>(p, corner, pass, of, columns, tile);
    most = max_bits(most, seen);
  }
  return most;
}

// The pass that only computes the amax is the same kernel without the cast, which saves half the
// code.
template <class X, Activation kind>
__global__ void __launch_bounds__(kThreads, 2) activate_kernel(Problem<X> p, bool first) {
  __shared__ Columns columns;
  __shared__ Tile tile;
  __shared__ CastPass shared;
  cast_pass(p.y.scale, first, blockIdx.x, shared);
  const CastPass of = shared;
  if (!of.encode && !of.collect) return;
  const bool collect = of.collect && p.channel_scale != nullptr;
  uint32_t seen = 0;
  for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    if (collect) {
      if (threadIdx.x < kTile) columns.bits[threadIdx.x] = 0;
      __syncthreads();
    }
    const Corner corner = corner_of(p.m, index);
    seen =
        max_bits(seen, activate_tile<X, kind>(p, corner, of, collect ? &columns : nullptr, tile));
    __syncthreads();
    if (of.encode) store_qt(p.y, tile, p.m, corner);
    if (collect && threadIdx.x < kTile) {
      const int64_t col = corner.col + threadIdx.x;
      if (col < p.m.cols)
        atomicMax(reinterpret_cast<uint32_t*>(p.channel_amax + col), columns.bits[threadIdx.x]);
    }
    __syncthreads();  // before the next tile
  }
  if (of.collect) leave_amax(p.y.scale, blockIdx.x, seen);
}

// The tile's values stay in registers: their scales follow from them, and then their codes.
// Without the least of one block ptxas takes 128 registers on sm_120 and spills.
template <class X>
__global__ void __launch_bounds__(kThreads, 1)
    activate_blocks_kernel(Problem<X> p, Activation kind, Targets to) {
  constexpr int kRun = run_length(sizeof(X));
  __shared__ Columns columns;
  __shared__ BlocksMemory memory;
  const Corner corner = corner_of_block(p.m);
  const bool collect = p.channel_scale != nullptr;
  if (collect) {
    if (threadIdx.x < kTile) columns.bits[threadIdx.x] = 0;
    __syncthreads();
  }
  float y[kPasses][kVector];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass)
    activate_values<X, Shape::any>(p, kind, fragment_in_pass<kRun>(p.m, corner, pass), true,
                                   collect ? &columns : nullptr, y[pass]);
  cast_blocks<kRun, void>(to, Kept{y}, corner.row / kTile, corner.col / kTile, memory);
  const int64_t col = corner.col + threadIdx.x;  // the cast has synchronised
  if (collect && threadIdx.x < kTile && col < p.m.cols)
    atomicMax(reinterpret_cast<uint32_t*>(p.channel_amax + col), columns.bits[threadIdx.x]);
}

bool are_aligned(const RowsView& v) { return is_aligned(v.data) && v.pitch % kVector == 0; }

// A problem without its cast.
template <class X>
Problem<X> make_problem(const GroupedView& x_saved, const GroupedView& up_saved,
                        float* channel_amax, const RowsView& x, const RowsView& up,
                        const float* channel_scale) {
  Problem<X> p = {};
  p.m = make_matrix(x.rows, x.cols);
  p.tiles = matrix_tiles(p.m);
  p.x_saved = device_groups(x_saved, kChunks);
  p.up_saved = device_groups(up_saved, kChunks);
  p.x = x.as<const X>();
  p.up = up.as<const X>();
  p.pitch = x.pitch;
  p.up_pitch = up.pitch;
  p.channel_scale = channel_scale;
  p.channel_amax = channel_amax;
  p.aligned = x.cols % kVector == 0 && are_aligned(x) && are_aligned(up);
  p.aligned_scale = is_aligned(channel_scale);
  return p;
}

// Clears the amaxes of channels and saves the groups that the kernel does not hold.
template <class X>
void before(const char* op, const Problem<X>& p, const GroupedView& x_saved,
            const GroupedView& up_saved, const RowsView& x, const RowsView& up, void* stream) {
  if (p.channel_scale != nullptr && x.cols > 0)
    clear(op, p.channel_amax, x.cols * sizeof(float), stream);
  if (!p.x_saved.held) save_groups(op, x_saved, x, stream);
  if (p.up != nullptr && !p.up_saved.held) save_groups(op, up_saved, up, stream);
}

}  // namespace

void activate_layouts(const LayoutsCast& y, const GroupedView& x_saved, const GroupedView& up_saved,
                      float* channel_amax, const RowsView& x, const RowsView& up,
                      const float* channel_scale, Activation kind, void* stream) {
  const char* op = "activate_layouts";
  check_activate_inputs(op, x_saved, up_saved, x, up);
  check_blocks(op, y, x.rows, x.cols);
  with_float(x.dtype, [&](auto type) {
    using X = decltype(type);
    const Problem<X> p = make_problem<X>(x_saved, up_saved, channel_amax, x, up, channel_scale);
    before(op, p, x_saved, up_saved, x, up, stream);
    if (x.numel() == 0) return;
    const Targets to = make_targets(y, x.rows, x.cols);
    launch(op, activate_blocks_kernel<X>, tile_count(to.padded), kThreads, stream, p, kind, to);
  });
}

void activate(const GemmCast& y, const GroupedView& x_saved, const GroupedView& up_saved,
              float* channel_amax, const RowsView& x, const RowsView& up,
              const float* channel_scale, Activation kind, void* stream) {
  const char* op = "activate";
  check_activate(y, x_saved, up_saved, x, up);
  with_float(x.dtype, [&](auto type) {
    using X = decltype(type);
    Problem<X> p = make_problem<X>(x_saved, up_saved, channel_amax, x, up, channel_scale);
    p.y = device_cast(op, y);
    p.shape = shape_of(p);
    before(op, p, x_saved, up_saved, x, up, stream);
    with_kind(kind, [&](auto k) {
      constexpr Activation f = decltype(k)::value;
      const CastBlocks blocks = cast_blocks(op, p.y.scale.mode, p.tiles);
      cast_in_passes(op, &p.y.scale, blocks, stream, [&](bool first, int64_t count) {
        launch(op, activate_kernel<X, f>, count, kThreads, stream, p, first);
      });
    });
  });
}

}  // namespace quaver::cuda
