// Dispatch to kernel templates by types and sizes that are known at run time.
#pragma once

#include <algorithm>

#include "quaver/quantize.h"
#include "runs.h"

namespace quaver::cuda {

// Calls body(T{}) with the storage type of `type`.
template <class Body>
void with_float(DType type, Body body) {
  if (type == DType::f32) return body(float{});
  if (type == DType::f16) return body(f16{});
  body(bf16{});
}

template <class Body>
void with_code(DType type, Body body) {
  if (type == DType::e4m3) return body(e4m3{});
  if (type == DType::e5m2) return body(e5m2{});
  body(f16{});
}

template <class Body>
void with_any(DType type, Body body) {
  if (is_fp8(type)) return with_code(type, body);
  with_float(type, body);
}

// Blocks that fill the device.
inline int64_t most_loop_blocks(const char* op) { return 8 * multiprocessors(op); }

// Blocks of a loop over n elements: no more than fill the device, so that few meet at the end.
inline int64_t loop_blocks(const char* op, int64_t n) {
  return std::max<int64_t>(1, std::min(ceil_div(n, kBlockSpan), most_loop_blocks(op)));
}

// The groups of values that share a scale, 1 x width each, and the threads that work on one. Groups
// of `height` rows share theirs with those below them.
struct ScaleSets {
  int64_t count, width, per_row, cols, height;
  int threads;  // of one group: up to a warp, or the whole block
};

inline ScaleSets make_scale_sets(const TensorView& x, const Layout& layout) {
  ScaleSets g;
  g.count = x.rows * layout.scales_in_row(x.cols);
  g.height = layout.height();
  g.width = std::min(layout.width(x.cols), x.cols);
  g.per_row = std::max<int64_t>(g.width > 0 ? ceil_div(x.cols, g.width) : 1, 1);
  g.cols = x.cols;
  g.threads = 1;
  while (g.threads < kWarp && g.threads * kVector < g.width) g.threads *= 2;
  if (g.width > kWarp * kVector) g.threads = kThreads;
  return g;
}

inline int64_t scale_set_blocks(const ScaleSets& g) {
  return ceil_div(g.count, kThreads / g.threads);
}

// Group, first element, number of elements and scale of the calling thread's group; none beyond the
// last.
struct Span {
  int64_t group, first, n, scale;
};

QUAVER_DEVICE Span span_of(const ScaleSets& g, int64_t block, int thread) {
  const int64_t group = block * (kThreads / g.threads) + thread / g.threads;
  if (group >= g.count) return {group, 0, 0, 0};
  const int64_t row = group / g.per_row;
  const int64_t col = (group - row * g.per_row) * g.width;
  const int64_t left = g.cols - col;
  return {group, row * g.cols + col, left < g.width ? left : g.width,
          row / g.height * g.per_row + group % g.per_row};
}

// Maximum over the `threads` threads of a group, in all of them.
QUAVER_DEVICE uint32_t group_max(uint32_t value, int threads) {
  if (threads <= kWarp) {
    for (int distance = threads / 2; distance > 0; distance /= 2)
      value = max_bits(value, __shfl_xor_sync(kAllLanes, value, distance));
    return value;
  }
  __shared__ uint32_t result;
  value = block_max(value);
  if (threadIdx.x == 0) result = value;
  __syncthreads();
  return result;
}

// Whether 16-byte accesses are right for every whole vector of every group.
inline bool are_aligned(const ScaleSets& g, const void* a, const void* b) {
  const bool starts = g.cols % kVector == 0 && (g.per_row == 1 || g.width % kVector == 0);
  return starts && is_aligned(a) && is_aligned(b);
}

}  // namespace quaver::cuda
