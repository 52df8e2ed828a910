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
  AdamSpan span;  // pointers to the first element
  AtomicAmax amax[3];
};

struct Piece {
  int64_t parameter, begin, n;
};

void prepare(const AdamParameter& p, Plan* plan) {
  const double* h = p.hyper;
  plan->step = adam_step(h[0], h[1], h[2], h[3], h[4], *p.step + 1);
  auto scale = [](const StateView& s) { return is_scaled(s) ? *s.scale : 1.0f; };
  auto amax = [](const StateView& s) { return is_scaled(s) ? *s.amax : 0.0f; };
  AdamSpan& s = plan->span;
  s.weight = p.weight.values.data;
  s.exp_avg = p.exp_avg.values.data;
  s.exp_avg_sq = p.exp_avg_sq.values.data;
  s.grad = p.grad.data;
  s.fp8 = p.fp8.as<uint8_t>();
  s.weight_type = p.weight.values.dtype;
  s.exp_avg_type = p.exp_avg.values.dtype;
  s.exp_avg_sq_type = p.exp_avg_sq.values.dtype;
  s.grad_type = p.grad.dtype;
  s.weight_scale = scale(p.weight);
  s.exp_avg_scale = scale(p.exp_avg);
  s.exp_avg_sq_scale = scale(p.exp_avg_sq);
  s.grad_scale = p.grad_scale != nullptr ? *p.grad_scale : 1.0f;
  const AdamStep& step = plan->step;
  auto next = [&](const StateView& state, float bound) {
    return next_scale(scale_max(state.values.dtype), bound, scale(state));
  };
  s.new_weight_scale = next(p.weight, weight_bound(step, amax(p.weight)));
  s.new_exp_avg_scale = next(p.exp_avg, exp_avg_bound(step, amax(p.exp_avg), *p.grad_amax));
  s.new_exp_avg_sq_scale =
      next(p.exp_avg_sq, exp_avg_sq_bound(step, amax(p.exp_avg_sq), *p.grad_amax));
}

void run(const AdamParameter& p, Plan& plan, int64_t begin, int64_t n) {
  AdamSpan s = plan.span;
  auto move = [begin](void* pointer, DType type) -> void* {
    return static_cast<char*>(pointer) + begin * size_of(type);
  };
  s.weight = move(s.weight, s.weight_type);
  s.exp_avg = move(s.exp_avg, s.exp_avg_type);
  s.exp_avg_sq = move(s.exp_avg_sq, s.exp_avg_sq_type);
  s.grad = static_cast<const char*>(s.grad) + begin * size_of(s.grad_type);
  if (s.fp8 != nullptr) s.fp8 += begin;
  uint32_t amax[3] = {0, 0, 0};
  simd().adam(s, plan.step, n, amax);
  for (int k = 0; k < 3; ++k) plan.amax[k].add(amax[k]);
  if (s.fp8 == nullptr) return;
  const int64_t rows = p.fp8.rows, cols = p.fp8.cols;
  const int64_t first = begin / cols, last = (begin + n) / cols;  // pieces are whole rows
  for (int64_t r = first; r < last; r += kTile)
    for (int64_t c = 0; c < cols; c += kTile)
      simd().transpose(p.fp8_t.as<uint8_t>() + c * rows + r, rows,
                       p.fp8.as<uint8_t>() + r * cols + c, cols, std::min(kTile, last - r),
                       std::min(kTile, cols - c));
}

void finish(const AdamParameter& p, const Plan& plan) {
  auto record = [&](const StateView& s, float scale, int k) {
    if (!is_scaled(s)) return;
    *s.scale = scale;
    *s.amax = bit_cast<float>(plan.amax[k].bits());
  };
  record(p.weight, plan.span.new_weight_scale, 0);
  record(p.exp_avg, plan.span.new_exp_avg_scale, 1);
  record(p.exp_avg_sq, plan.span.new_exp_avg_sq_scale, 2);
  if (p.fp8_scale != nullptr) *p.fp8_scale = plan.span.new_weight_scale * kMasterToFp8;
  ++*p.step;
}

}  // namespace

void adam(const AdamParameter* parameters, int64_t count, int64_t* skipped) {
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    check_adam(parameters[i]);
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
    const int64_t n = p.weight.values.numel();
    int64_t size = kGrain;
    if (p.fp8.data != nullptr) {  // whole strips of rows, so that a piece can transpose its codes
      const int64_t strip = kTile * std::max<int64_t>(p.fp8.cols, 1);
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
