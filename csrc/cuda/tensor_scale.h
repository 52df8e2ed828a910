// The scale of a whole-tensor cast, chosen on the device: the host never waits for it. A cast is up
// to two launches, of which the second returns at once where it has nothing to do:
//
//   given    one pass casts with the caller's scale; where the amax is wanted too, a kernel of one
//            block takes it of what the blocks saw
//   now      the first pass collects the amax, the second casts (just in time)
//   delayed  the first pass casts with the history's forecast, if there is one, and collects the
//            amax; the second casts just in time where the forecast is stale, and its first block
//            records the amax (FP8-LM, arXiv 2310.18313; see quaver/scale.h)
//
// A block of the first pass leaves the largest magnitude that it saw in the workspace, where every
// block of the second takes their maximum. So nothing has to be cleared before, which would be a
// launch more, and nothing outlives the call: a graph can capture it.
#pragma once

#include "quaver/quantize.h"
#include "runs.h"

namespace quaver::cuda {

enum class ScaleMode : int8_t { given, now, delayed };

struct TensorScale {
  float* scale;
  float* amax;  // null: not wanted
  float* history;
  float* forecast;    // what the first pass read of the history, for the second
  uint32_t* partial;  // [partials], of the first pass, one for each of its blocks
  int64_t partials;
  float finite_max;
  bool power_of_two, spread_nan;
  ScaleMode mode;
};

constexpr int64_t kPartialsAt = 16;  // bytes into the workspace

inline TensorScale tensor_scale(const char* op, DType type, float* scale, float* amax,
                                bool power_of_two, const ScaleSource& source) {
  const ScaleMode mode = source.given                ? ScaleMode::given
                         : source.history != nullptr ? ScaleMode::delayed
                                                     : ScaleMode::now;
  QUAVER_CHECK(source.workspace != nullptr || (source.given && amax == nullptr), op,
               ": a cast that looks for the amax needs a workspace, got none");
  auto* memory = static_cast<char*>(source.workspace);
  TensorScale s = {};
  s.scale = scale;
  s.amax = amax;
  s.history = source.history;
  s.forecast = reinterpret_cast<float*>(memory);
  s.partial = memory == nullptr ? nullptr : reinterpret_cast<uint32_t*>(memory + kPartialsAt);
  s.finite_max = scale_max(type);
  s.power_of_two = power_of_two;
  s.spread_nan = source.spread_nan;
  s.mode = mode;
  return s;
}

// Blocks of each pass over a matrix of so many tiles, of which a block takes one or, in a loop,
// several. Few blocks collect an amax, because all blocks of the second pass read what they leave.
struct CastBlocks {
  int64_t first, second;
};

CastBlocks cast_blocks(const char* op, ScaleMode mode, int64_t tiles);

// Records how many blocks leave what they saw.
inline void set_partials(TensorScale* s, const CastBlocks& blocks) {
  s->partials = s->mode == ScaleMode::given ? blocks.second : blocks.first;
}

// After the passes: writes the amax of a given scale's cast, where it is wanted.
void write_amax(const char* op, const TensorScale& s, void* stream);

// Launches pass(first, blocks) for each pass of the mode.
template <class Pass>
void cast_in_passes(const char* op, TensorScale* s, const CastBlocks& blocks, void* stream,
                    Pass pass) {
  set_partials(s, blocks);
  if (s->mode != ScaleMode::given) pass(true, blocks.first);
  pass(false, blocks.second);
  write_amax(op, *s, stream);
}

// The work of a pass: to encode, to collect the amax, both or nothing.
struct CastPass {
  bool encode, collect;
  float scale;  // to encode with
  Divisor by;
};

QUAVER_DEVICE CastPass make_pass(bool encode, bool collect, float scale) {
  return {encode, collect, scale, divisor(scale)};
}

// The first pass under a history. Its first block leaves the forecast to the second pass, because
// the history changes there.
QUAVER_DEVICE CastPass forecast_pass(const TensorScale& s, int64_t block) {
  const float forecast = delayed_scale(s.history, s.finite_max, s.power_of_two);
  if (block == 0) *s.forecast = forecast;
  return make_pass(forecast != 0.0f, true, forecast);
}

// The second pass over values of this amax, whose first block writes what readers get.
QUAVER_DEVICE CastPass last_pass(const TensorScale& s, int64_t block, float amax) {
  const float forecast = s.mode == ScaleMode::delayed ? *s.forecast : 0.0f;
  const bool stale = is_stale(forecast, amax, s.finite_max);
  const float scale = stale ? scale_from_amax(amax, s.finite_max, s.power_of_two) : forecast;
  if (block == 0) {
    if (s.amax != nullptr) *s.amax = amax;
    *s.scale = s.spread_nan ? nan_unless_finite(scale, amax) : scale;
    if (s.mode == ScaleMode::delayed) record_amax(s.history, amax);
  }
  return make_pass(stale, false, scale);
}

QUAVER_DEVICE uint32_t largest_partial(const TensorScale& s) {
  uint32_t seen = 0;
  for (int64_t i = threadIdx.x; i < s.partials; i += kThreads) seen = max_bits(seen, s.partial[i]);
  return block_max(seen);
}

// Chooses the pass of this block, the `block`-th of the cast, in memory that its threads share. All
// of them call it.
QUAVER_DEVICE void cast_pass(const TensorScale& s, bool first, int64_t block, CastPass& shared) {
  const bool reads = !first && s.mode != ScaleMode::given;
  const uint32_t seen = reads ? largest_partial(s) : 0;
  if (threadIdx.x == 0) {
    if (s.mode == ScaleMode::given)
      shared = make_pass(!first, !first && s.amax != nullptr, *s.scale);
    else if (!first)
      shared = last_pass(s, block, bit_cast<float>(seen));
    else
      shared = s.mode == ScaleMode::now ? make_pass(false, true, 1.0f) : forecast_pass(s, block);
  }
  __syncthreads();
}

// The largest magnitude that this block sees of n elements, by `blocks` that take turns.
template <class X>
QUAVER_DEVICE uint32_t look(const X* x, int64_t n, int64_t block, int64_t blocks, bool aligned) {
  constexpr int kRun = run_length(sizeof(X));
  uint32_t seen = 0;
  const int64_t step = blocks * kBlockSpan;
  for (int64_t i = block * kBlockSpan + threadIdx.x * kRun; i < n; i += step) {
    float v[kVector];
    decode_vector<X>(load_runs<kRun>(x + i, kThreads * kRun, n - i, aligned), v);
    seen = max_bits(seen, amax_bits(v));
  }
  return seen;
}

// Leaves what this block saw. All its threads call it.
QUAVER_DEVICE void leave_amax(const TensorScale& s, int64_t block, uint32_t seen) {
  seen = block_max(seen);
  if (threadIdx.x == 0) s.partial[block] = seen;
}

}  // namespace quaver::cuda
