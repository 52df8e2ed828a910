// The gradients of an activation from its saved FP8 inputs, cast to both GEMM layouts from
// registers (quaver/activate.h). A block computes a tile of both gradients. Where a scale is chosen
// just in time, an earlier pass computes the amaxes.
#include "../arguments.h"
#include "../check_cast_layouts.h"
#include "dispatch.h"
#include "fused_cast.h"
#include "layouts.h"
#include "quaver/activate.h"

namespace quaver::cuda {
namespace {

template <class X>
struct Problem {
  Matrix m;
  int64_t tiles;
  DeviceCast dx, dup;
  DeviceGroups x, up;  // up without codes: dup is none
  const X* dy;
  const float* channel_scale;
  bool aligned, aligned_scale;
  bool fast;   // a fast path (fused_cast.h) is for it
  bool joint;  // dx and dup are halves of one matrix with the scale of dx
};

// What a fast path knows of a problem: two gradients, of inputs in groups that are a tile wide.
template <bool kFast, class X>
QUAVER_DEVICE Problem<X> with_known(Problem<X> p) {
  if (!kFast) return p;
  p.dx.aligned = p.dup.aligned = p.aligned = true;
  p.x = as_tile_wide(p.x);
  p.up = as_tile_wide(p.up);
  p.channel_scale = nullptr;
  return p;
}

template <class X>
bool is_fast(const Problem<X>& p) {
  return p.aligned && p.dx.aligned && p.dup.aligned && p.channel_scale == nullptr &&
         are_tile_wide(p.x) && are_tile_wide(p.up);
}

template <class X>
constexpr int kRun = run_length(sizeof(X));

// Computes dx and dup of up to kVector values, with zeros behind them. kWhole: there are as many,
// and of one group; then dup is there too.
template <class X, bool kWhole = false>
QUAVER_DEVICE void gradients(const Problem<X>& p, Activation kind, const Fragment<kRun<X>>& at,
                             float (&dx)[kVector], float (&dup)[kVector]) {
  constexpr int kApart = kRunsApart<kRun<X>>;
  float x[kVector];
  const int64_t i = at.row * p.m.cols + at.col;
  decode_vector<X>(load_runs<kRun<X>>(p.dy + i, kApart, at.n, p.aligned), dx);
  load_vector<kRun<X>, kWhole>(p.x, at.row, at.col, kApart, at.n, x);
  if (p.channel_scale != nullptr) {
    float scale[kVector];
    decode_vector<float>(
        load_runs<kRun<X>>(p.channel_scale + at.col, kApart, at.n, p.aligned_scale), scale);
#pragma unroll
    for (int k = 0; k < kVector; ++k) dx[k] *= scale[k];
  }
  if (kWhole || p.up.codes != nullptr) {
    load_vector<kRun<X>, kWhole>(p.up, at.row, at.col, kApart, at.n, dup);
  } else {  // one product instead of a path of its own: x * 1 has the bits of x
#pragma unroll
    for (int k = 0; k < kVector; ++k) dup[k] = 1.0f;
  }
  with_kind_of_all(kind, [&](auto constant) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const Gradients d = activation_gradients<decltype(constant)::value>(dx[k], x[k], dup[k]);
      dx[k] = d.x;
      dup[k] = d.up;
    }
  });
}

// The bits of the largest magnitudes of what a thread has of both gradients.
struct Seen {
  uint32_t dx, dup;
};

// Computes and casts what a thread has of both gradients in one pass over a tile. A fast path takes
// all values for numbers.
template <bool kFast, class X, Activation kind>
QUAVER_DEVICE Seen backward_pass(const Problem<X>& any, Corner corner, int pass, CastPass of,
                                 CastPass of_up, Tile& tile, Tile& tile_up) {
  const Problem<X> p = with_known<kFast>(any);
  auto at = fragment_in_pass<kRun<X>>(p.m, corner, pass);
  if (kFast) {
    of = {true, true, of.scale, as_multiplication(of.by)};
    of_up = {true, true, of_up.scale, as_multiplication(of_up.by)};
    at = as_inside(at);
  }
  float dx[kVector], dup[kVector];
  gradients<X, kFast>(p, kind, at, dx, dup);
  Seen seen = {amax_bits(dx), 0};
  if (of.encode) put_values(p.dx, tile, at, dx, kFast ? 0 : seen.dx, of.by);
  if (!kFast && p.up.codes == nullptr) return seen;
  seen.dup = amax_bits(dup);
  if (of_up.encode) put_values(p.dup, tile_up, at, dup, kFast ? 0 : seen.dup, of_up.by);
  return seen;
}

// The pass that only computes amaxes is the same kernel without the cast, which saves half the
// code.
template <class X, Activation kind>
__global__ void __launch_bounds__(kThreads, 2) activate_backward_kernel(Problem<X> p, bool first) {
  __shared__ Tile tile, tile_up;
  // In registers these would spill on sm_100.
  __shared__ CastPass of, of_up;
  __shared__ uint32_t all_up[kThreads];  // each thread's own
  const bool gated = p.up.codes != nullptr;
  cast_pass(p.dx.scale, first, blockIdx.x, of);
  if (gated && !p.joint)
    cast_pass(p.dup.scale, first, blockIdx.x, of_up);
  else if (threadIdx.x == 0)
    of_up = p.joint ? of : make_pass(false, false, 1.0f);
  __syncthreads();
  if (!of.encode && !of.collect && !of_up.encode && !of_up.collect) return;
  uint32_t seen = 0;
  uint32_t& seen_up = all_up[threadIdx.x];
  seen_up = 0;
  for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Corner corner = corner_of(p.m, index);
    const bool fast = p.fast && of.encode && of.collect && of_up.encode && of_up.collect &&
                      !of.by.divide && !of_up.by.divide && is_inside(p.m, corner);
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
      Seen now = {};
      if (fast) now = backward_pass<true, X, kind>(p, corner, pass, of, of_up, tile, tile_up);
      const uint32_t most = max_bits(now.dx, now.dup);
      if (!fast || !is_number(__reduce_max_sync(kAllLanes, most)))
        now = backward_pass<false, X, kind>(p, corner, pass, of, of_up, tile, tile_up);
      seen = max_bits(seen, now.dx);
      seen_up = max_bits(seen_up, now.dup);
    }
    __syncthreads();
    if (of.encode) store_qt(p.dx, tile, p.m, corner);
    if (of_up.encode) store_qt(p.dup, tile_up, p.m, corner);
    __syncthreads();  // before the next tile
  }
  if (p.joint) seen = max_bits(seen, seen_up);
  if (of.collect) leave_amax(p.dx.scale, blockIdx.x, seen);
  if (of_up.collect && !p.joint) leave_amax(p.dup.scale, blockIdx.x, seen_up);
}

// Both gradients stay in registers: their scales follow from them, and then their codes. Without
// the least of one block ptxas takes 128 registers on sm_120 and spills.
template <class X>
__global__ void __launch_bounds__(kThreads, 1)
    activate_backward_blocks_kernel(Problem<X> p, Activation kind, Targets to_x, Targets to_up) {
  __shared__ BlocksMemory memory;
  const Corner corner = corner_of_block(p.m);
  float dx[kPasses][kVector], dup[kPasses][kVector];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass)
    gradients(p, kind, fragment_in_pass<kRun<X>>(p.m, corner, pass), dx[pass], dup[pass]);
  const int64_t down = corner.row / kTile, along = corner.col / kTile;
  cast_blocks<kRun<X>, void>(to_x, Kept{dx}, down, along, memory);
  if (p.up.codes == nullptr) return;
  __syncthreads();
  cast_blocks<kRun<X>, void>(to_up, Kept{dup}, down, along, memory);
}

// A problem without its casts.
template <class X>
Problem<X> make_problem(const TensorView& dy, const GroupedView& x, const GroupedView& up,
                        const float* channel_scale) {
  Problem<X> p = {};
  p.m = make_matrix(dy.rows, dy.cols);
  p.tiles = matrix_tiles(p.m);
  p.x = device_groups(x, 0);
  p.up = device_groups(up, 0);
  p.dy = dy.as<const X>();
  p.channel_scale = channel_scale;
  p.aligned = dy.cols % kVector == 0 && is_aligned(dy.data);
  p.aligned_scale = is_aligned(channel_scale);
  return p;
}

// Blocks that serve both casts.
CastBlocks joint(CastBlocks a, CastBlocks b) {
  return {std::max(a.first, b.first), std::max(a.second, b.second)};
}

// The part of a joint cast that begins behind m's columns.
DeviceCast second_half(DeviceCast c, const Matrix& m) {
  c.q += m.cols;
  c.qt += m.cols * m.padded.rows;
  return c;
}

}  // namespace

void activate_backward_layouts(const LayoutsCast& dx, const LayoutsCast& dup, const TensorView& dy,
                               const GroupedView& x, const GroupedView& up,
                               const float* channel_scale, Activation kind, void* stream) {
  const char* op = "activate_backward_layouts";
  check_gradient_inputs(op, dy, x, up);
  check_blocks(op, dx, dy.rows, dy.cols);
  if (up.codes.data != nullptr) check_blocks(op, dup, dy.rows, dy.cols);
  if (dy.numel() == 0) return;
  with_float(dy.dtype, [&](auto type) {
    using X = decltype(type);
    const Problem<X> p = make_problem<X>(dy, x, up, channel_scale);
    const Targets to_x = make_targets(dx, dy.rows, dy.cols);
    const Targets to_up = make_targets(dup, dy.rows, dy.cols);
    launch(op, activate_backward_blocks_kernel<X>, tile_count(to_x.padded), kThreads, stream, p,
           kind, to_x, to_up);
  });
}

void activate_backward(const GemmCast& dx, const GemmCast& dup, const TensorView& dy,
                       const GroupedView& x, const GroupedView& up, const float* channel_scale,
                       Activation kind, void* stream) {
  const char* op = "activate_backward";
  check_activate_backward(dx, dup, dy, x, up);
  with_float(dy.dtype, [&](auto type) {
    using X = decltype(type);
    Problem<X> p = make_problem<X>(dy, x, up, channel_scale);
    p.dx = device_cast(op, dx);
    p.joint = is_joint(dup, up);
    const bool two = p.up.codes != nullptr && !p.joint;
    if (two) p.dup = device_cast(op, dup);
    if (p.joint) p.dup = second_half(p.dx, p.m);
    p.fast = is_fast(p);
    CastBlocks blocks = cast_blocks(op, p.dx.scale.mode, p.tiles);
    if (two) blocks = joint(blocks, cast_blocks(op, p.dup.scale.mode, p.tiles));
    set_partials(&p.dx.scale, blocks);
    set_partials(&p.dup.scale, blocks);
    with_kind(kind, [&](auto k) {
      constexpr Activation f = decltype(k)::value;
      launch(op, activate_backward_kernel<X, f>, blocks.first, kThreads, stream, p, true);
      launch(op, activate_backward_kernel<X, f>, blocks.second, kThreads, stream, p, false);
    });
    write_amax(op, p.dx.scale, stream);
    if (two) write_amax(op, p.dup.scale, stream);
  });
}

}  // namespace quaver::cuda
