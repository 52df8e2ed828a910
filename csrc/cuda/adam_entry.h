// The table entry of a parameter that adam.cu's kernels read, and the plan of its step, computed
// once.
#pragma once

#include "../arguments.h"
#include "quaver/dither.h"
#include "remainder.h"
#include "state_block.h"
#include "transpose.h"

namespace quaver::cuda {

constexpr int64_t kChunk = kTile * kTile;  // elements of a parameter that one block updates
constexpr int kStates = 3;                 // weight, exp_avg, exp_avg_sq

struct State {
  void* values;
  float* scale;  // of the tensor, or of each group
  float* amax;
  DType type;
  Scaling scaling;
  bool scaled;  // as a whole: the step chooses its scale and records its amax
};

// Parameters whose states have types that a kernel is compiled for, so that its branches on them
// vanish: `scaled` f16, e4m3 and f16, each with one scale (FP8-LM), `quick` these under an e4m3
// gradient and rounded stochastically, `expanded` moments of e4m3 beside a plain weight (COAT).
enum class Kind : uint8_t { any, scaled, quick, expanded };

struct Entry {
  State state[kStates];
  const void* grad;
  const float* grad_scale;  // null: 1
  const float* grad_amax;
  uint8_t *fp8, *fp8_t;  // null: none
  float* fp8_scale;
  Remainder remainder;
  Subsets subsets;
  const float* subset_sums;
  float* rates;  // of subsets; null: none
  uint64_t seed;
  int64_t* step;
  const double* hyper;
  int64_t numel, first;   // elements, and the first block of this parameter
  int64_t first_element;  // for the noise
  Tiles tiles;
  DType grad_type;
  bool stochastic, stochastic_exp_avg, tiled, aligned, aligned_t;
  bool whole;  // no four elements of an access cross an edge
  Kind kind;
};

// The constants of one step of one parameter, computed once.
struct Plan {
  AdamStep step;
  float scale[kStates], grad_scale;  // decode, as stored
  float new_scale[kStates];          // decode, to be stored
  float inverse[kStates];            // 1 / new_scale
  float amax[kStates];
  Dither dither;
};

QUAVER_DEVICE const float* grad_amax_of(const Entry& e) { return e.grad_amax; }

QUAVER_DEVICE void plan_step(const Entry& e, Plan* plan) {
  Plan p;
  const double* h = e.hyper;
  p.step = adam_step(h[0], h[1], h[2], h[3], h[4], next_step(*e.step));
  p.dither = make_dither(e.seed, static_cast<uint64_t>(*e.step));
  p.grad_scale = e.grad_scale != nullptr ? *e.grad_scale : 1.0f;
  float amax[kStates];
#pragma unroll
  for (int k = 0; k < kStates; ++k) {
    const bool scaled = e.state[k].scaled;
    p.scale[k] = scaled ? *e.state[k].scale : 1.0f;
    amax[k] = scaled ? *e.state[k].amax : 0.0f;
    p.amax[k] = 0.0f;
  }
  const float bound[kStates] = {weight_bound(p.step, amax[0]),
                                exp_avg_bound(p.step, amax[1], *e.grad_amax),
                                exp_avg_sq_bound(p.step, amax[2], *e.grad_amax)};
#pragma unroll
  for (int k = 0; k < kStates; ++k) {
    const float max = e.state[k].scaled ? scale_max(e.state[k].type) : 0.0f;
    p.new_scale[k] = next_scale(max, bound[k], p.scale[k]);
    p.inverse[k] = 1.0f / p.new_scale[k];
  }
  *plan = p;
}

// What `kind_of` found, as constants.
template <Kind kKind, std::enable_if_t<kKind == Kind::any, int> = 0>
QUAVER_DEVICE const Entry& with_known(const Entry& e) {
  return e;
}

template <Kind kKind, std::enable_if_t<kKind != Kind::any, int> = 0>
QUAVER_DEVICE Entry with_known(Entry e) {
  const bool scaled = kKind == Kind::scaled || kKind == Kind::quick;
  if (kKind == Kind::quick) {
    e.grad_type = DType::e4m3;
    e.stochastic = e.stochastic_exp_avg = true;
  }
#pragma unroll
  for (int k = 0; k < kStates; ++k) {
    e.state[k].scaled = scaled;
    e.state[k].scaling = scaled || k == 0 ? Scaling::tensor : Scaling::expand;
    if (scaled || k > 0) e.state[k].type = scaled && k != 1 ? DType::f16 : DType::e4m3;
  }
  e.rates = nullptr;
  e.whole = true;
  if (scaled) {
    e.remainder.bytes = 0;
  } else {
    e.fp8 = nullptr;
    e.tiled = false;
  }
  return e;
}

inline Kind kind_of(const Entry& e) {
  const auto has = [&](int k, DType type, Scaling scaling, bool scaled) {
    const State& s = e.state[k];
    return s.type == type && s.scaling == scaling && s.scaled == scaled;
  };
  if (!e.whole || e.rates != nullptr) return Kind::any;
  if (has(0, DType::f16, Scaling::tensor, true) && has(1, DType::e4m3, Scaling::tensor, true) &&
      has(2, DType::f16, Scaling::tensor, true) && e.remainder.bytes == 0)
    return e.grad_type == DType::e4m3 && e.stochastic && e.stochastic_exp_avg ? Kind::quick
                                                                              : Kind::scaled;
  if (!e.state[0].scaled && has(1, DType::e4m3, Scaling::expand, false) &&
      has(2, DType::e4m3, Scaling::expand, false) && e.fp8 == nullptr)
    return Kind::expanded;
  return Kind::any;
}

inline Entry make_entry(const AdamParameter& p, int64_t first, float* rates) {
  Entry e = {};
  e.first = first;
  e.numel = p.weight.values.numel();
  e.tiles = make_tiles(p.fp8.rows, p.fp8.cols);
  const bool grouped =
      p.exp_avg.scaling != Scaling::tensor || p.exp_avg_sq.scaling != Scaling::tensor;
  e.tiled = p.fp8.data != nullptr && !(grouped && p.fp8.cols % kGroup != 0);
  e.aligned = is_aligned(p.grad.data) && is_aligned(p.fp8.data) && is_aligned(p.remainder.data) &&
              (!e.tiled || p.fp8.cols % kVector == 0);
  const StateView* states[kStates] = {&p.weight, &p.exp_avg, &p.exp_avg_sq};
  for (int k = 0; k < kStates; ++k) {
    const StateView& s = *states[k];
    e.state[k] = {s.values.data, s.scale, s.amax, s.values.dtype, s.scaling, is_scaled(s)};
    if (k < 2 || p.subsets.width == 0) e.aligned = e.aligned && is_aligned(s.values.data);
  }
  e.grad = p.grad.data;
  e.grad_type = p.grad.dtype;
  e.grad_scale = p.grad_scale;
  e.grad_amax = p.grad_amax;
  e.fp8 = p.fp8.as<uint8_t>();
  e.fp8_t = p.fp8_t.as<uint8_t>();
  e.fp8_scale = p.fp8_scale;
  e.aligned_t = is_aligned(p.fp8_t.data) && p.fp8.rows % kVector == 0;
  e.remainder = p.remainder;
  e.subsets = p.subsets;
  e.subset_sums = p.subset_sums;
  e.rates = p.subsets.width != 0 ? rates : nullptr;
  e.stochastic = p.stochastic;
  e.stochastic_exp_avg = rounds_exp_avg(p);
  e.seed = p.seed;
  e.first_element = p.first_element;
  e.step = p.step;
  e.hyper = p.hyper;
  e.whole = e.aligned && (e.tiled || e.numel % kQuad == 0);
  e.kind = kind_of(e);
  return e;
}

inline int64_t chunk_count(const Entry& e) {
  return e.tiled ? tile_count(e.tiles) : ceil_div(e.numel, kChunk);
}

}  // namespace quaver::cuda
