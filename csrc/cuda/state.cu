// Optimizer states in groups of 128 flat elements to and from values, with or without dynamic range
// expansion (COAT, arXiv 2410.19313, section 4). A warp takes a group.
#include "../arguments.h"
#include "dispatch.h"
#include "state_block.h"

namespace quaver::cuda {
namespace {

constexpr int64_t kBlockGroups = kThreads / kWarp;

struct Problem {
  void* values;
  DType type;  // of the values
  void* codes;
  DType format;
  float* scales;
  int64_t numel, groups;
  bool expand, aligned;
};

struct Place {
  int64_t group, i, n;  // the lane's first element, and how many are left
};

// The same number of turns for every warp of a block.
QUAVER_DEVICE Place place(const Problem& p, int64_t turn) {
  const int64_t group = turn * kBlockGroups + threadIdx.x / kWarp;
  const int64_t i = group * kGroup + threadIdx.x % kWarp * kQuad;
  return {group, i, p.numel - i};
}

__global__ void __launch_bounds__(kThreads) encode_kernel(Problem p) {
  for (int64_t turn = blockIdx.x; turn * kBlockGroups < p.groups; turn += gridDim.x) {
    const Place at = place(p, turn);
    const AnyQuad loaded = load_quad(p.values, p.type, at.i, at.n, p.aligned);
    float x[kQuad], y[kQuad];
    decode_any(p.type, loaded, 0, 1.0f, x);
    const float scale = scale_of_warp(p.format, p.expand, x);
    if (at.group < p.groups && threadIdx.x % kWarp == 0) p.scales[at.group] = scale;
    to_format(p.format, p.expand, scale, x, y);
    keep_nonzero(p.format, x, y);
    AnyQuad codes = {};
    encode_any(p.format, y, 1.0f, 0, codes);
    store_quad(p.codes, p.format, at.i, codes, at.n, p.aligned);
  }
}

__global__ void __launch_bounds__(kThreads) decode_kernel(Problem p) {
  __shared__ Logarithms logarithms;
  fill(logarithms, threadIdx.x);
  __syncthreads();
  for (int64_t turn = blockIdx.x; turn * kBlockGroups < p.groups; turn += gridDim.x) {
    const Place at = place(p, turn);
    if (at.n <= 0) continue;
    const AnyQuad codes = load_quad(p.codes, p.format, at.i, at.n, p.aligned);
    const float scale = p.scales[at.group];
    float x[kQuad];
    if (p.expand)
      decode_expanded(p.format, codes, scale, logarithms, x);
    else
      decode_any(p.format, codes, 0, scale, x);
    AnyQuad values = {};
    encode_any(DType::f32, x, 1.0f, 0, values);
    store_quad(p.values, DType::f32, at.i, values, at.n, p.aligned);
  }
}

Problem problem(const StateView& s, const TensorView& x) {
  const int64_t n = x.numel();
  return {x.data,
          x.dtype,
          s.values.data,
          s.values.dtype,
          s.scale,
          n,
          group_count(n),
          s.scaling == Scaling::expand,
          is_aligned(x.data) && is_aligned(s.values.data)};
}

int64_t blocks(const char* op, int64_t groups) {
  return std::max<int64_t>(1, std::min(ceil_div(groups, kBlockGroups), 16 * multiprocessors(op)));
}

}  // namespace

void encode_state(const StateView& state, const TensorView& x, void* stream) {
  check_encode_state(state, x);
  if (x.numel() == 0) return;
  const Problem p = problem(state, x);
  launch("encode_state", encode_kernel, blocks("encode_state", p.groups), kThreads, stream, p);
}

void decode_state(const TensorView& out, const StateView& state, void* stream) {
  check_decode_state(out, state);
  if (out.numel() == 0) return;
  const Problem p = problem(state, out);
  launch("decode_state", decode_kernel, blocks("decode_state", p.groups), kThreads, stream, p);
}

}  // namespace quaver::cuda
