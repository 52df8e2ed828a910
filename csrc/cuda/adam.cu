// AdamW over all parameters in one launch (FP8-LM, arXiv 2310.18313, section 2.2): states are
// decoded, updated and encoded in registers, and the e4m3 GEMM copies of a weight are written in
// both layouts from its new codes. A block updates one chunk of one parameter: 16384 elements in a
// row, or a 128 x 128 tile where there is an FP8 copy to transpose. A state in groups (COAT, arXiv
// 2410.19313) needs whole groups of 128 in a row: where a matrix is not a multiple of that wide,
// its copy is transposed by a launch of its own.
//
// Scales are known before the pass from bounds of the new amaxes (quaver/adam.h). Whether the step
// is skipped, its number and its hyperparameters are read on the device.
#include "adam_groups.h"
#include "list_op.h"
#include "transpose.h"

namespace quaver::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;
constexpr int kTurns = kChunk / (kThreads * kQuad);

constexpr int kAhead = 2;  // turns whose loads are in flight together

using Problem = ListOp<Entry, Plan>;

// Encodes a moment. All threads of a warp must call it.
QUAVER_DEVICE void encode_moment(const Entry& e, const Plan& p, int k, const float (&x)[kQuad],
                                 const float (&grad)[kQuad], const uint32_t (&start)[kQuad],
                                 Loaded& l) {
  const State& s = e.state[k];
  float y[kQuad];
  if (s.scaling == Scaling::tensor) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) y[j] = x[j] * p.inverse[k];
  } else {
    const bool expands = s.scaling == Scaling::expand;
    const float scale = scale_of_warp(s.type, expands, x);
    if (l.n > 0 && threadIdx.x % kWarp == 0) s.scale[l.i / kGroup] = scale;
    to_format(s.type, expands, scale, x, y);
  }
  if (k == 1) {
    uint32_t noise[kQuad];
#pragma unroll
    for (int j = 0; j < kQuad; ++j) noise[j] = exp_avg_noise(p.dither, start[j]);
    settle_first(s.type, x, grad, e.stochastic_exp_avg, noise, y);
  } else if (is_fp8(s.type)) {
    keep_nonzero(s.type, x, y);
  }
  encode_any(s.type, y, 1.0f, 0, l.state[k]);
}

// Updates four elements; returns the codes of their FP8 copy.
QUAVER_DEVICE uint32_t update(const Entry& e, const Plan& p, const Logarithms& logarithms,
                              Loaded& l, uint32_t (&seen)[kStates]) {
  float x[kStates][kQuad], grad[kQuad];
  decode_weight(e, l, x[0]);
  const int own = e.rates != nullptr ? 2 : kStates;  // states with a value for each element
#pragma unroll
  for (int k = 1; k < kStates; ++k)
    if (k < own) decode_state(e.state[k], l.state[k], l.scale[k], logarithms, x[k]);
  if (own < kStates) load_rates(e, l.i, l.n, x[2]);
  decode_any(e.grad_type, l.grad, 0, p.grad_scale, grad);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const AdamElement before = {x[0][j], x[1][j], x[2][j]};
    const AdamElement element = own < kStates ? subset_adamw(p.step, before, grad[j], x[2][j])
                                              : adamw(p.step, before, grad[j]);
    // Beyond the edge all is zero, and 0 / (0 + eps) is NaN where eps is 0.
    x[0][j] = j < l.n ? element.weight : 0.0f;
    x[1][j] = element.exp_avg;
    x[2][j] = element.exp_avg_sq;
  }
  uint32_t start[kQuad] = {};
  if (e.stochastic) dither_starts(p.dither, static_cast<uint64_t>(e.first_element + l.i), start);
  encode_weight(e, p, x[0], start, l);
  if (e.remainder.bytes != 0)
    store_quad(e.remainder.data, remainder_type(e.remainder), l.i, l.remainder, l.n, e.aligned,
               e.whole);
#pragma unroll
  for (int k = 1; k < kStates; ++k)
    if (k < own) encode_moment(e, p, k, x[k], grad, start, l);
#pragma unroll
  for (int k = 0; k < kStates; ++k) {
    if (k >= own) continue;
    const State& s = e.state[k];
    store_quad(s.values, s.type, l.i, l.state[k], l.n, e.aligned, e.whole);
    if (!s.scaled) continue;
    decode_any(s.type, l.state[k], 0, p.new_scale[k], x[k]);  // the amax of what is stored
    seen[k] = max_bits(seen[k], amax_bits(x[k]));
  }
  if (e.fp8 == nullptr) return 0;
  // The copy is made from the new codes, so that a reload gives the same one.
  decode_any(DType::f16, l.state[0], 0, 1.0f / kMasterToFp8, x[0]);
  AnyQuad codes = {{convert_word<e4m3>(x[0])}};
  store_quad(e.fp8, DType::e4m3, l.i, codes, l.n, e.aligned, e.whole);
  return codes.word[0];
}

// Four elements by the quick path, and by the general one where a weight is none for it.
template <Kind kKind>
QUAVER_DEVICE uint32_t update_loaded(const Entry& e, const Plan& p, const Logarithms& logarithms,
                                     Loaded& l, uint32_t (&seen)[kStates],
                                     [[maybe_unused]] CodeMaxima& most) {
#if defined(__CUDA_ARCH__)
  if constexpr (kKind == Kind::quick) {
    if (l.n <= 0) return 0;
    const auto element = static_cast<uint64_t>(e.first_element + l.i);
    if (!update_quick(p, element, l.state, l.grad, most)) return update(e, p, logarithms, l, seen);
#pragma unroll
    for (int k = 0; k < kStates; ++k)
      store_quad(e.state[k].values, e.state[k].type, l.i, l.state[k], l.n, e.aligned, e.whole);
    if (e.fp8 == nullptr) return 0;
    const AnyQuad codes = {{copy_of(l.state[0].word[0], l.state[0].word[1])}};
    store_quad(e.fp8, DType::e4m3, l.i, codes, l.n, e.aligned, e.whole);
    return codes.word[0];
  }
#endif
  return update(e, p, logarithms, l, seen);
}

// Where a thread's fours lie: a turn's lie `step` elements behind those of the turn before.
struct Turns {
  int64_t first, step, n;  // n: elements from the first one to the end of its row or tensor
  int inside;              // turns of which the first element is inside
};

QUAVER_DEVICE Turns turns_of(const Entry& e, int64_t chunk) {
  const int word = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;  // a warp takes a tile's row
  Turns t;
  int64_t most;
  if (e.tiled) {
    const int64_t row = chunk / e.tiles.across * kTile + warp;
    const int64_t col = chunk % e.tiles.across * kTile + word * kQuad;
    t = {row * e.tiles.cols + col, kWarps * e.tiles.cols, e.tiles.cols - col, 0};
    most = t.n > 0 ? (e.tiles.rows - row + kWarps - 1) / kWarps : 0;
  } else {
    t = {chunk * kChunk + int64_t(threadIdx.x) * kQuad, kThreads * kQuad, 0, 0};
    t.n = e.numel - t.first;
    most = (t.n + t.step - 1) / t.step;
  }
  t.inside = int(most < 0 ? 0 : most < kTurns ? most : kTurns);
  return t;
}

// What is left of the row or tensor in a turn.
QUAVER_DEVICE int64_t left_in_turn(const Entry& e, const Turns& t, int turn) {
  if (turn >= t.inside) return 0;
  return e.whole ? kQuad : e.tiled ? t.n : t.n - turn * t.step;
}

// Updates one chunk of a parameter.
template <Kind kKind>
QUAVER_DEVICE void update_chunk(const Problem& p, int64_t owner, const Logarithms& logarithms,
                                Tile& tile) {
  // Where the types are known copies need not be read again after each store; all of an entry and
  // its plan are too much for registers, except in the quick path.
  using HeldEntry = std::conditional_t<kKind == Kind::any, const Entry&, const Entry>;
  using HeldPlan = std::conditional_t<kKind == Kind::quick, const Plan, const Plan&>;
  HeldEntry e = with_known<kKind>(p.table[owner]);
  HeldPlan plan = p.plans[owner];
  const int64_t chunk = blockIdx.x - e.first;
  const bool tiled = e.tiled;
  const unsigned word = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Turns turns = turns_of(e, chunk);
  uint32_t seen[kStates] = {};
  CodeMaxima most = {};
  int64_t i = turns.first;
#pragma unroll 1
  for (int turn = 0; turn < kTurns; turn += kAhead) {
    Loaded loaded[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      loaded[a] = load_elements(e, plan, i, left_in_turn(e, turns, turn + a));
      i += turns.step;
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const uint32_t codes = update_loaded<kKind>(e, plan, logarithms, loaded[a], seen, most);
      if (tiled) put_word(tile, (turn + a) * kWarps + warp, word, codes);
    }
  }
  if (kKind == Kind::quick) raise_stored(most, plan, seen);
  if (tiled) {
    __syncthreads();
    store_transposed(e.fp8_t, tile, e.tiles, chunk / e.tiles.across * kTile,
                     chunk % e.tiles.across * kTile, threadIdx.x, e.aligned_t);
  }
#pragma unroll
  for (int k = 0; k < kStates; ++k) block_atomic_max(&p.plans[owner].amax[k], seen[k]);
}

// The four groups of a warp in a turn of the path for numbers.
QUAVER_DEVICE int64_t span_begin(const Entry& e, int turn) {
  return (blockIdx.x - e.first) * kChunk + (turn * kWarps + threadIdx.x / kWarp) * kWarpSpan;
}

// Updates one chunk of a parameter of which the moments are expanded: what the path for numbers
// left, a turn of the whole warp for each group. Apart, each has its registers to itself.
QUAVER_DEVICE void update_expanded_chunk(const Problem& p, int64_t owner,
                                         const Logarithms& logarithms,
                                         const LaneLogarithms& lanes) {
  constexpr int kSpans = kChunk / (kWarps * kWarpSpan);
  const Plan& plan = p.plans[owner];
  const Entry e = with_known<Kind::expanded>(p.table[owner]);
  uint32_t left = 0;  // a bit for each span
#pragma unroll 1
  for (int turn = 0; turn < kSpans; ++turn) {
    const int64_t i = span_begin(e, turn);
    const bool whole = e.numel - i >= kWarpSpan;
    if (!whole || !update_groups(e, plan, lanes, i)) left |= 1u << turn;
  }
  uint32_t seen[kStates] = {};  // of states with one scale, of which there are none
#pragma unroll 1
  for (int turn = 0; turn < kSpans * kQuads; ++turn) {
    if ((left >> turn / kQuads & 1) == 0) continue;
    const int64_t i = span_begin(e, turn / kQuads) + turn % kQuads * kGroup;
    if (i >= e.numel) break;
    const int64_t at = i + threadIdx.x % kWarp * kQuad;
    Loaded l = load_elements(e, plan, at, e.numel - at);
    update(e, plan, logarithms, l, seen);
  }
}

// What a block has in shared memory: a tile of copies, or a table for moments in groups.
union Scratch {
  Tile tile;
  LaneLogarithms lanes;
};

__global__ void __launch_bounds__(kThreads, 2) update_kernel(Problem p) {
  __shared__ Scratch scratch;
  __shared__ Logarithms logarithms;
  if (*p.skip) return;
  fill(logarithms, threadIdx.x);
  __syncthreads();
  const int64_t owner = owner_of(p.table, p.count, blockIdx.x);
  switch (p.table[owner].kind) {
    case Kind::scaled: update_chunk<Kind::scaled>(p, owner, logarithms, scratch.tile); break;
    case Kind::quick: update_chunk<Kind::quick>(p, owner, logarithms, scratch.tile); break;
    case Kind::expanded:
      fill(scratch.lanes, logarithms, threadIdx.x);
      __syncthreads();
      update_expanded_chunk(p, owner, logarithms, scratch.lanes);
      break;
    default: update_chunk<Kind::any>(p, owner, logarithms, scratch.tile);
  }
}

// Runs in one block.
__global__ void __launch_bounds__(kThreads) end_kernel(Problem p) {
  if (*p.skip) return;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads) {
    const Entry& e = p.table[i];
    const Plan& plan = p.plans[i];
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      if (!e.state[k].scaled) continue;
      *e.state[k].scale = plan.new_scale[k];
      *e.state[k].amax = plan.amax[k];
    }
    if (e.fp8_scale != nullptr) *e.fp8_scale = plan.new_scale[0] * kMasterToFp8;
    *e.step = next_step(*e.step);
  }
}

// The second moments of one parameter's subsets, which a launch steps before all elements.
struct SubsetEntry {
  int64_t first, parameter, count;
};

__global__ void __launch_bounds__(kThreads)
    subset_kernel(Problem p, const SubsetEntry* table, int64_t count) {
  if (*p.skip) return;
  const SubsetEntry& s = table[owner_of(table, count, blockIdx.x)];
  const int64_t k = (blockIdx.x - s.first) * kThreads + threadIdx.x;
  if (k >= s.count) return;
  const Entry& e = p.table[s.parameter];
  const AdamStep& step = p.plans[s.parameter].step;
  const State& v = e.state[2];
  e.rates[k] = subset_rate(step, step_subset(step, v.values, v.type, k, e.subset_sums[k]));
}

// Appends the transposition of a copy whose update did not write the transpose itself.
void add_transposition(const Entry& e, std::vector<TransposeEntry>* list, int64_t* tiles) {
  if (e.fp8 == nullptr || e.tiled) return;
  const bool aligned = is_aligned(e.fp8) && e.tiles.cols % kVector == 0;
  list->push_back({e.fp8, e.fp8_t, *tiles, e.tiles, aligned, e.aligned_t});
  *tiles += tile_count(e.tiles);
}

// Where the tables of late launches and the rates of subsets begin in the workspace.
struct Places {
  int64_t transpositions, subsets, end;
};

Places places_of(int64_t count) {
  const int64_t first = list_bytes<Entry, Plan>(count);
  const int64_t second = first + rounded(count * int64_t(sizeof(TransposeEntry)));
  return {first, second, second + rounded(count * int64_t(sizeof(SubsetEntry)))};
}

int64_t rate_bytes(const AdamParameter& p) {
  return p.subsets.width == 0 ? 0 : rounded(p.exp_avg_sq.values.numel() * 4);
}

}  // namespace

int64_t adam_workspace_bytes(const AdamParameter* parameters, int64_t count) {
  int64_t bytes = places_of(count).end;
  for (int64_t i = 0; i < count; ++i) bytes += rate_bytes(parameters[i]);
  return bytes;
}

void adam(const AdamParameter* parameters, int64_t count, int64_t* skipped, void* workspace,
          void* stream) {
  const char* op = "adam_";
  auto* memory = static_cast<char*>(workspace);
  const Places late = places_of(count);
  char* rates = memory + late.end;
  std::vector<Entry> entries;
  std::vector<TransposeEntry> transpositions;
  std::vector<SubsetEntry> subsets;
  int64_t chunks = 0, tiles = 0, subset_blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    const AdamParameter& p = parameters[i];
    check_adam(p);
    entries.push_back(make_entry(p, chunks, reinterpret_cast<float*>(rates)));
    chunks += chunk_count(entries.back());
    add_transposition(entries.back(), &transpositions, &tiles);
    rates += rate_bytes(p);
    if (p.subsets.width == 0 || p.exp_avg_sq.values.numel() == 0) continue;
    subsets.push_back({subset_blocks, i, p.exp_avg_sq.values.numel()});
    subset_blocks += ceil_div(subsets.back().count, kThreads);
  }
  if (count == 0) return;
  const Problem p = begin<Plan>(op, entries, skipped, workspace, stream);
  const auto tables = static_cast<int64_t>(subsets.size());
  upload(op, memory + late.subsets, subsets.data(), tables * int64_t(sizeof(SubsetEntry)), stream);
  if (tables > 0)
    launch(op, subset_kernel, subset_blocks, kThreads, stream, p,
           reinterpret_cast<const SubsetEntry*>(memory + late.subsets), tables);
  const auto late_count = static_cast<int64_t>(transpositions.size());
  char* transposed = memory + late.transpositions;
  upload(op, transposed, transpositions.data(), late_count * int64_t(sizeof(TransposeEntry)),
         stream);
  if (chunks > 0) launch(op, update_kernel, chunks, kThreads, stream, p);
  transpose_codes(op, reinterpret_cast<const TransposeEntry*>(transposed), late_count, tiles,
                  p.skip, stream);
  launch(op, end_kernel, 1, kThreads, stream, p);
}

}  // namespace quaver::cuda
