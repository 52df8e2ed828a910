#include "quaver/optimizer.h"

#include <algorithm>
#include <vector>

#include "../arguments.h"
#include "parallel.h"
#include "simd.h"

namespace quaver::cpu {
namespace {

// One parameter with everything that is fixed for the step.
struct Plan {
  AdamStep step;
  AdamSpan span;             // pointers to the first element
  std::vector<float> rates;  // of the subsets
  AtomicAmax amax[3];
};

static_assert(kGrain % kGroup == 0 && 2 * kTile % kGroup == 0, "a piece begins with a group");

struct Piece {
  int64_t parameter, begin, n;
};

StateSpan span_of(const StateView& s, float bound) {
  StateSpan span = {s.values.data, s.values.dtype, s.scaling, 1.0f, 1.0f, nullptr};
  if (s.scaling != Scaling::tensor) {
    span.scales = s.scale;
  } else if (is_scaled(s)) {
    span.scale = *s.scale;
    span.new_scale = next_scale(scale_max(s.values.dtype), bound, *s.scale);
  }
  return span;
}

void prepare(const AdamParameter& p, Plan* plan) {
  const double* h = p.hyper;
  plan->step = adam_step(h[0], h[1], h[2], h[3], h[4], next_step(*p.step));
  auto amax = [](const StateView& s) { return is_scaled(s) ? *s.amax : 0.0f; };
  const AdamStep& step = plan->step;
  AdamSpan& s = plan->span;
  s.weight = span_of(p.weight, weight_bound(step, amax(p.weight)));
  s.exp_avg = span_of(p.exp_avg, exp_avg_bound(step, amax(p.exp_avg), *p.grad_amax));
  s.exp_avg_sq = span_of(p.exp_avg_sq, exp_avg_sq_bound(step, amax(p.exp_avg_sq), *p.grad_amax));
  s.grad = p.grad.data;
  s.grad_type = p.grad.dtype;
  s.grad_scale = p.grad_scale != nullptr ? *p.grad_scale : 1.0f;
  s.fp8 = p.fp8.as<uint8_t>();
  s.remainder = p.remainder;
  s.stochastic = p.stochastic;
  s.stochastic_exp_avg = rounds_exp_avg(p);
  s.subsets = p.subsets;
  if (p.subsets.width != 0) {
    plan->rates.resize(p.exp_avg_sq.values.numel());
    s.rates = plan->rates.data();
  }
  s.dither = make_dither(p.seed, static_cast<uint64_t>(*p.step));
  s.first = static_cast<uint64_t>(p.first_element);
}

void run(const AdamParameter& p, Plan& plan, int64_t begin, int64_t n) {
  AdamSpan s = plan.span;
  s.begin = begin;
  for (StateSpan* state : {&s.weight, &s.exp_avg, &s.exp_avg_sq}) {
    if (state == &s.exp_avg_sq && s.rates != nullptr) continue;
    state->values = static_cast<char*>(state->values) + begin * size_of(state->type);
    if (state->scales != nullptr) state->scales += begin / kGroup;
  }
  s.grad = static_cast<const char*>(s.grad) + begin * size_of(s.grad_type);
  if (s.fp8 != nullptr) s.fp8 += begin;
  s.remainder.data = static_cast<char*>(s.remainder.data) + begin * s.remainder.bytes;
  s.first += static_cast<uint64_t>(begin);
  uint32_t amax[3] = {0, 0, 0};
  simd().adam(s, plan.step, n, amax);
  for (int k = 0; k < 3; ++k) plan.amax[k].add(amax[k]);
  if (s.fp8 == nullptr) return;
  const int64_t rows = p.fp8.rows, cols = p.fp8.cols;
  const int64_t first = begin / cols, last = (begin + n) / cols;  // pieces are whole rows
  for (int64_t r = first; r < last; r += kTile)
    simd().transpose(p.fp8_t.as<uint8_t>() + r, rows, p.fp8.as<uint8_t>() + r * cols, cols,
                     std::min(kTile, last - r), cols, streams(rows * cols));
}

// Updates the second moments of subsets and their rates, before the pass over the elements.
void step_subsets(const AdamParameter& p, Plan* plan) {
  const AdamStep step = plan->step;
  const TensorView& values = p.exp_avg_sq.values;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      plan->rates[k] =
          subset_rate(step, step_subset(step, values.data, values.dtype, k, p.subset_sums[k]));
  };
  if (p.subsets.width != 0) parallel_for(values.numel(), kGrain, body);
}

void finish(const AdamParameter& p, const Plan& plan) {
  auto record = [&](const StateView& s, float scale, int k) {
    if (!is_scaled(s)) return;
    *s.scale = scale;
    *s.amax = bit_cast<float>(plan.amax[k].bits());
  };
  record(p.weight, plan.span.weight.new_scale, 0);
  record(p.exp_avg, plan.span.exp_avg.new_scale, 1);
  record(p.exp_avg_sq, plan.span.exp_avg_sq.new_scale, 2);
  if (p.fp8_scale != nullptr) *p.fp8_scale = plan.span.weight.new_scale * kMasterToFp8;
  *p.step = next_step(*p.step);
}

}  // namespace

void adam(const AdamParameter* parameters, int64_t count, int64_t* skipped) {
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    check_adam(parameters[i]);
    const int64_t taken = *parameters[i].step;
    QUAVER_CHECK(taken >= 0 && taken < INT64_MAX,
                 "adam_: a step count must be in [0, 2^63 - 1), got ", taken);
    finite = finite && is_finite(*parameters[i].grad_amax);
  }
  if (!finite) {
    ++*skipped;
    return;
  }
  std::vector<Plan> plans(count);
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < count; ++i) {
    const AdamParameter& p = parameters[i];
    prepare(p, &plans[i]);
    step_subsets(p, &plans[i]);
    const int64_t n = p.weight.values.numel();
    int64_t size = kGrain;
    if (p.fp8.data != nullptr) {
      // A piece is whole strips of rows, so that it can transpose its codes, and whole groups.
      const int64_t strip = 2 * kTile * std::max<int64_t>(p.fp8.cols, 1);
      size = strip * std::max<int64_t>(1, kGrain / strip);
    }
    for (int64_t begin = 0; begin < n; begin += size)
      pieces.push_back({i, begin, std::min(size, n - begin)});
  }
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      run(parameters[pieces[k].parameter], plans[pieces[k].parameter], pieces[k].begin,
          pieces[k].n);
  };
  parallel_for(static_cast<int64_t>(pieces.size()), 1, body);
  for (int64_t i = 0; i < count; ++i) finish(parameters[i], plans[i]);
}

}  // namespace quaver::cpu
