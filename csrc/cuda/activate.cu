// SwiGLU, GeGLU and plain activations, cast to both GEMM layouts from registers
// (quaver/activate.h). A block computes a tile, stores its rows at once, and its columns through
// shared memory. The pass that collects the amax also saves the copies of x and up. COAT's Group
// Scaling (arXiv 2410.19313, section 4.3) would read the group maxima of the result instead, but
// they cost the same pass here, which is also the one that saves.
#include "../arguments.h"
#include "dispatch.h"
#include "fused_cast.h"
#include "quaver/activate.h"

namespace quaver::cuda {
namespace {

template <class X>
struct Problem {
  Matrix m;
  int64_t tiles;
  DeviceCast y;
  DeviceGroups x_saved, up_saved;
  const X *x, *up;  // up null: none
  const float* channel_scale;
  float* channel_amax;
  bool aligned, aligned_scale;
};

// The largest |v| of a tile's columns.
struct Columns {
  uint32_t bits[kTile];
};

QUAVER_DEVICE void scale_channels(const float* channel_scale, bool aligned, Columns* columns,
                                  const Fragment& p, float (&v)[kVector]) {
  if (columns != nullptr) {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < p.n) atomicMax(&columns->bits[p.at.chunk * kVector + i], magnitude_bits(v[i]));
  }
  float scale[kVector];
  decode_vector<float>(load<4>(channel_scale + p.col, 4, p.n, aligned), scale);
#pragma unroll
  for (int i = 0; i < kVector; ++i) v[i] *= scale[i];
}

// Computes a tile, saves its inputs where the pass collects, and casts the result to q and, in
// shared memory, for qt. Returns the largest magnitude.
template <class X, Activation kind>
QUAVER_DEVICE uint32_t activate_tile(const Problem<X>& p, int64_t index, const CastPass& of,
                                     Columns* columns, Tile& tile) {
  uint32_t seen = 0;
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const Fragment at = fragment_in_pass(p.m, index, pass);
    const int64_t i = at.row * p.m.cols + at.col;
    float v[kVector];
    decode_vector<X>(load<sizeof(X)>(p.x + i, sizeof(X), at.n, p.aligned), v);
    Packed<sizeof(X)> up = {};
    if (p.up != nullptr) up = load<sizeof(X)>(p.up + i, sizeof(X), at.n, p.aligned);
    if (of.collect && p.x_saved.threads > 0) save_vector(p.x_saved, at.row, at.col, at.n, v);
#pragma unroll
    for (int k = 0; k < kVector; ++k) v[k] = quaver::activate<kind>(v[k]);
    if (p.up != nullptr) {
      float u[kVector];
      decode_vector<X>(up, u);
      if (of.collect && p.up_saved.threads > 0) save_vector(p.up_saved, at.row, at.col, at.n, u);
#pragma unroll
      for (int k = 0; k < kVector; ++k) v[k] *= u[k];
    }
    if (p.channel_scale != nullptr)
      scale_channels(p.channel_scale, p.aligned_scale, columns, at, v);
    seen = max_bits(seen, amax_bits(v));
    if (of.encode) put_values(p.y, tile, p.m, at, v, of.by);
  }
  return seen;
}

// The pass that only computes the amax is the same kernel without the cast, which saves half the
// code.
template <class X, Activation kind>
__global__ void __launch_bounds__(kThreads) activate_kernel(Problem<X> p, bool first) {
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
    seen = max_bits(seen, activate_tile<X, kind>(p, index, of, collect ? &columns : nullptr, tile));
    __syncthreads();
    if (of.encode) store_qt(p.y, tile, p.m, index);
    if (collect && threadIdx.x < kTile) {
      const int64_t col = index % p.m.padded.across * kTile + threadIdx.x;
      if (col < p.m.cols)
        atomicMax(reinterpret_cast<uint32_t*>(p.channel_amax + col), columns.bits[threadIdx.x]);
    }
    __syncthreads();  // before the next tile
  }
  if (of.collect) leave_amax(p.y.scale, blockIdx.x, seen);
}

}  // namespace

void activate(const GemmCast& y, const GroupedView& x_saved, const GroupedView& up_saved,
              float* channel_amax, const TensorView& x, const TensorView& up,
              const float* channel_scale, Activation kind, void* stream) {
  const char* op = "activate";
  check_activate(y, x_saved, up_saved, x, up);
  with_float(x.dtype, [&](auto type) {
    using X = decltype(type);
    Problem<X> p;
    p.m = make_matrix(x.rows, x.cols);
    p.tiles = matrix_tiles(p.m);
    p.y = device_cast(op, y);
    p.x_saved = device_groups(x_saved, kChunks);
    p.up_saved = device_groups(up_saved, kChunks);
    p.x = x.as<const X>();
    p.up = up.as<const X>();
    p.channel_scale = channel_scale;
    p.channel_amax = channel_amax;
    p.aligned = x.cols % kVector == 0 && is_aligned(x.data) && is_aligned(up.data);
    p.aligned_scale = is_aligned(channel_scale);
    if (channel_scale != nullptr && x.cols > 0)
      clear(op, channel_amax, x.cols * sizeof(float), stream);
    if (p.x_saved.threads == 0) save_groups(op, x_saved, x, stream);
    if (p.up != nullptr && p.up_saved.threads == 0) save_groups(op, up_saved, up, stream);
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
