// AdamW over all parameters in one launch (FP8-LM, arXiv 2310.18313, section 2.2): states are
// decoded, updated and encoded in registers, and the e4m3 GEMM copies of a weight are written in
// both layouts from its new codes. A block updates one chunk of one parameter: 16384 elements in a
// row, or a 128 x 128 tile where there is an FP8 copy to transpose.
//
// Scales are known before the pass from bounds of the new amaxes (quaver/adam.h). Whether the step
// is skipped, its number and its hyperparameters are read on the device.
#include <vector>

#include "../arguments.h"
#include "any.h"
#include "quaver/adam.h"
#include "table.h"
#include "tile.h"

namespace quaver::cuda {
namespace {

constexpr int64_t kChunk = kTile * kTile;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTurns = kChunk / (kThreads * kQuad);
constexpr int kAhead = 2;   // turns whose loads are in flight together
constexpr int kStates = 3;  // weight, exp_avg, exp_avg_sq

struct State {
  void* values;
  float* scale;
  float* amax;
};

struct Entry {
  State state[kStates];
  const void* grad;
  const float* grad_scale;  // null: 1
  const float* grad_amax;
  uint8_t *fp8, *fp8_t;  // null: none
  float* fp8_scale;
  int64_t* step;
  const double* hyper;
  int64_t numel, first;
  Tiles tiles;
  DType type[kStates], grad_type;
  bool aligned, aligned_t;
};

// What a step of one parameter needs, computed once.
struct Plan {
  AdamStep step;
  float scale[kStates], grad_scale;  // decode, as stored
  float new_scale[kStates];          // decode, to be stored
  float inverse[kStates];            // 1 / new_scale
  float amax[kStates];
};

struct Problem {
  const Entry* table;
  Plan* plans;
  int* skip;
  int64_t count;
  int64_t* skipped;
};

QUAVER_DEVICE void plan_step(const Entry& e, Plan* plan) {
  Plan p;
  const double* h = e.hyper;
  p.step = adam_step(h[0], h[1], h[2], h[3], h[4], *e.step + 1);
  p.grad_scale = e.grad_scale != nullptr ? *e.grad_scale : 1.0f;
  float amax[kStates];
#pragma unroll
  for (int k = 0; k < kStates; ++k) {
    const bool scaled = scale_max(e.type[k]) > 0.0f;
    p.scale[k] = scaled ? *e.state[k].scale : 1.0f;
    amax[k] = scaled ? *e.state[k].amax : 0.0f;
    p.amax[k] = 0.0f;
  }
  const float bound[kStates] = {weight_bound(p.step, amax[0]),
                                exp_avg_bound(p.step, amax[1], *e.grad_amax),
                                exp_avg_sq_bound(p.step, amax[2], *e.grad_amax)};
#pragma unroll
  for (int k = 0; k < kStates; ++k) {
    p.new_scale[k] = next_scale(scale_max(e.type[k]), bound[k], p.scale[k]);
    p.inverse[k] = 1.0f / p.new_scale[k];
  }
  *plan = p;
}

// One block. A gradient that is not finite anywhere skips the step everywhere.
__global__ void __launch_bounds__(kThreads) begin_kernel(Problem p) {
  bool bad = false;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads)
    bad = bad || !is_finite(*p.table[i].grad_amax);
  bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) {
    *p.skip = bad;
    if (bad) ++*p.skipped;
  }
  if (bad) return;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads) plan_step(p.table[i], &p.plans[i]);
}

struct Loaded {
  AnyQuad state[kStates], grad;
  int64_t i, n;  // first element, and how many are left of its row or tensor
};

QUAVER_DEVICE Loaded load_elements(const Entry& e, int64_t i, int64_t n) {
  Loaded l;
  l.i = i;
  l.n = n;
#pragma unroll
  for (int k = 0; k < kStates; ++k)
    l.state[k] = load_quad(e.state[k].values, e.type[k], i, n, e.aligned);
  l.grad = load_quad(e.grad, e.grad_type, i, n, e.aligned);
  return l;
}

// Updates four elements; returns the codes of their FP8 copy.
QUAVER_DEVICE uint32_t update(const Entry& e, const Plan& p, Loaded& l, uint32_t (&seen)[kStates]) {
  float x[kStates][kQuad], grad[kQuad];
#pragma unroll
  for (int k = 0; k < kStates; ++k) decode_any(e.type[k], l.state[k], 0, p.scale[k], x[k]);
  decode_any(e.grad_type, l.grad, 0, p.grad_scale, grad);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const AdamElement element = adamw(p.step, {x[0][j], x[1][j], x[2][j]}, grad[j]);
    // Beyond the edge all is zero, and 0 / (0 + eps) is NaN where eps is 0.
    x[0][j] = j < l.n ? element.weight : 0.0f;
    x[1][j] = e.type[1] == DType::e4m3
                  ? settle_exp_avg(element.exp_avg, p.new_scale[1], p.inverse[1])
                  : element.exp_avg;
    x[2][j] = element.exp_avg_sq;
  }
#pragma unroll
  for (int k = 0; k < kStates; ++k) {
    encode_any(e.type[k], x[k], p.inverse[k], 0, l.state[k]);
    decode_any(e.type[k], l.state[k], 0, p.new_scale[k], x[k]);  // the amax of what is stored
    seen[k] = max_bits(seen[k], amax_bits(x[k]));
    store_quad(e.state[k].values, e.type[k], l.i, l.state[k], l.n, e.aligned);
  }
  if (e.fp8 == nullptr) return 0;
  // From the new codes, so that a reload gives the same copy.
  decode_any(DType::f16, l.state[0], 0, 1.0f / kMasterToFp8, x[0]);
  AnyQuad codes = {{convert_word<e4m3>(x[0])}};
  store_quad(e.fp8, DType::e4m3, l.i, codes, l.n, e.aligned);
  return codes.word[0];
}

__global__ void __launch_bounds__(kThreads, 2) update_kernel(Problem p) {
  __shared__ Tile tile;
  if (*p.skip) return;
  const int64_t owner = owner_of(p.table, p.count, blockIdx.x);
  const Entry& e = p.table[owner];
  Plan& plan = p.plans[owner];
  const int64_t chunk = blockIdx.x - e.first;
  const bool tiled = e.fp8 != nullptr;
  const int64_t row0 = chunk / e.tiles.across * kTile, col0 = chunk % e.tiles.across * kTile;
  const int word = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;  // a warp takes a tile's row
  uint32_t seen[kStates] = {};
#pragma unroll 1
  for (int turn = 0; turn < kTurns; turn += kAhead) {
    Loaded loaded[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      int64_t i = chunk * kChunk + ((turn + a) * kThreads + int(threadIdx.x)) * kQuad;
      int64_t n = e.numel - i;
      if (tiled) {
        const int64_t row = row0 + (turn + a) * kWarps + warp, col = col0 + word * kQuad;
        i = row * e.tiles.cols + col;
        n = row < e.tiles.rows ? e.tiles.cols - col : 0;
      }
      loaded[a] = load_elements(e, i, n);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const uint32_t codes = update(e, plan, loaded[a], seen);
      if (tiled) put_word(tile, (turn + a) * kWarps + warp, word, codes);
    }
  }
  if (tiled) {
    __syncthreads();
    store_transposed(e.fp8_t, tile, e.tiles, row0, col0, threadIdx.x, e.aligned_t);
  }
#pragma unroll
  for (int k = 0; k < kStates; ++k) block_atomic_max(&plan.amax[k], seen[k]);
}

// One block.
__global__ void __launch_bounds__(kThreads) end_kernel(Problem p) {
  if (*p.skip) return;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads) {
    const Entry& e = p.table[i];
    const Plan& plan = p.plans[i];
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      if (!(scale_max(e.type[k]) > 0.0f)) continue;
      *e.state[k].scale = plan.new_scale[k];
      *e.state[k].amax = plan.amax[k];
    }
    if (e.fp8_scale != nullptr) *e.fp8_scale = plan.new_scale[0] * kMasterToFp8;
    ++*e.step;
  }
}

Entry make_entry(const AdamParameter& p, int64_t first) {
  Entry e = {};
  e.first = first;
  e.numel = p.weight.values.numel();
  e.tiles = make_tiles(p.fp8.rows, p.fp8.cols);
  e.aligned = is_aligned(p.grad.data) && is_aligned(p.fp8.data) &&
              (p.fp8.data == nullptr || p.fp8.cols % kVector == 0);
  const StateView* states[kStates] = {&p.weight, &p.exp_avg, &p.exp_avg_sq};
  for (int k = 0; k < kStates; ++k) {
    e.state[k] = {states[k]->values.data, states[k]->scale, states[k]->amax};
    e.type[k] = states[k]->values.dtype;
    e.aligned = e.aligned && is_aligned(states[k]->values.data);
  }
  e.grad = p.grad.data;
  e.grad_type = p.grad.dtype;
  e.grad_scale = p.grad_scale;
  e.grad_amax = p.grad_amax;
  e.fp8 = p.fp8.as<uint8_t>();
  e.fp8_t = p.fp8_t.as<uint8_t>();
  e.fp8_scale = p.fp8_scale;
  e.aligned_t = is_aligned(p.fp8_t.data) && p.fp8.rows % kVector == 0;
  e.step = p.step;
  e.hyper = p.hyper;
  return e;
}

int64_t chunk_count(const Entry& e) {
  return e.fp8 != nullptr ? tile_count(e.tiles) : ceil_div(e.numel, kChunk);
}

int64_t table_bytes(int64_t count) { return ceil_div(count * int64_t(sizeof(Entry)), 16) * 16; }

constexpr int64_t kSkipBytes = 16;

}  // namespace

int64_t adam_workspace_bytes(int64_t count) {
  return table_bytes(count) + kSkipBytes + count * int64_t(sizeof(Plan));
}

void adam(const AdamParameter* parameters, int64_t count, int64_t* skipped, void* workspace,
          void* stream) {
  const char* op = "adam_";
  std::vector<Entry> entries;
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) {
    check_adam(parameters[i]);
    entries.push_back(make_entry(parameters[i], chunks));
    chunks += chunk_count(entries.back());
  }
  if (count == 0) return;
  auto* memory = static_cast<char*>(workspace);
  Problem p;
  p.table = reinterpret_cast<const Entry*>(memory);
  p.skip = reinterpret_cast<int*>(memory + table_bytes(count));
  p.plans = reinterpret_cast<Plan*>(memory + table_bytes(count) + kSkipBytes);
  p.count = count;
  p.skipped = skipped;
  upload(op, workspace, entries.data(), count * int64_t(sizeof(Entry)), stream);
  launch(op, begin_kernel, 1, kThreads, stream, p);
  if (chunks > 0) launch(op, update_kernel, chunks, kThreads, stream, p);
  launch(op, end_kernel, 1, kThreads, stream, p);
}

}  // namespace quaver::cuda
