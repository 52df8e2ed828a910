#include "quaver/adam4.h"

#include "../check_adam4.h"
#include "list_op.h"

namespace quaver::binding {
namespace {

constexpr const char* kOp = "adam_4bit_";

// The arguments as the schema has them.
struct Arguments {
  const Tensors &weights, &exp_avgs, &exp_avg_scales, &exp_avg_sqs, &exp_avg_sq_scales, &grads,
      &grad_scales;
  const Tensor& grad_amax;
  const Tensors& steps;
  const Tensor &hyper, &skipped;
  const Tensors& remainders;
  const Ints &seconds, &seeds;
};

void check(const Arguments& a) {
  const size_t n = a.weights.size();
  const NamedList lists[] = {
      {"weights", a.weights, n},
      {"exp_avgs", a.exp_avgs, n},
      {"exp_avg_scales", a.exp_avg_scales, n},
      {"exp_avg_sqs", a.exp_avg_sqs, n},
      {"exp_avg_sq_scales", a.exp_avg_sq_scales, n},
      {"grads", a.grads, n},
      {"grad_scales", a.grad_scales, n},
      {"steps", a.steps, n},
      {"remainders", a.remainders, n, true},
  };
  check_lists(kOp, lists);
  check_length(kOp, "seconds", a.seconds, n);
  check_length(kOp, "seeds", a.seeds, n, true);
  if (n == 0) return;
  check_step(kOp, a.weights[0], n, a.grad_amax, a.hyper, a.skipped, 5,
             "lr, beta1, beta2, eps, decay");
}

void read_second(const Arguments& a, size_t i, int64_t n, Adam4Parameter* p) {
  const int64_t second = a.seconds[i];
  QUAVER_CHECK(second >= 0 && second <= static_cast<int64_t>(Second::factor), kOp,
               ": seconds must be 0 (block), 1 (rank-1) or 2 (factor), got ", second);
  p->second = static_cast<Second>(second);
  const Tensor& weight = a.weights[i];
  QUAVER_CHECK(p->second == Second::block || (weight.dim() >= 2 && weight.dim() <= kMaxAxes), kOp,
               ": a rank-1 or factored second moment needs 2 to ", kMaxAxes, " axes, got ",
               weight.dim());
  if (p->second != Second::block) {
    p->shape.axes = static_cast<int>(weight.dim());
    for (int k = 0; k < p->shape.axes; ++k) p->shape.size[k] = weight.size(k);
  }
  const int64_t codes = p->second == Second::factor ? 0 : (n + 1) / 2;
  const int64_t scales = second_scale_count(p->second, p->shape, n);
  void* code = data_of(kOp, "exp_avg_sq", a.exp_avg_sqs[i], codes, ScalarType::Byte);
  p->exp_avg_sq = codes > 0 ? static_cast<uint8_t*>(code) : nullptr;
  p->exp_avg_sq_scale = static_cast<float*>(
      data_of(kOp, "exp_avg_sq_scale", a.exp_avg_sq_scales[i], scales, ScalarType::Float));
}

// Parameter i. `grad` and `grad_amax` are contiguous.
Adam4Parameter parameter(const Arguments& a, size_t i, const Tensor& grad, const float* grad_amax) {
  Adam4Parameter p;
  p.weight = view(kOp, "weight", a.weights[i]);
  const int64_t n = p.weight.numel();
  p.exp_avg =
      static_cast<uint8_t*>(data_of(kOp, "exp_avg", a.exp_avgs[i], (n + 1) / 2, ScalarType::Byte));
  p.exp_avg_scale = static_cast<float*>(
      data_of(kOp, "exp_avg_scale", a.exp_avg_scales[i], group_count(n), ScalarType::Float));
  read_second(a, i, n, &p);
  p.remainder = remainder_of(kOp, a.remainders, i, n);
  read_step(kOp, i, grad, a.grad_scales[i], grad_amax, a.seeds, a.hyper, &p);
  p.step = static_cast<int64_t*>(data_of(kOp, "step", a.steps[i], 1, ScalarType::Long));
  return p;
}

void adam_4bit_(const Tensors& weights, const Tensors& exp_avgs, const Tensors& exp_avg_scales,
                const Tensors& exp_avg_sqs, const Tensors& exp_avg_sq_scales, const Tensors& grads,
                const Tensors& grad_scales, const Tensor& grad_amax, const Tensors& steps,
                const Tensor& hyper, Tensor skipped, const Tensors& remainders, const Ints& seconds,
                const Ints& seeds) {
  const Arguments a = {weights, exp_avgs,    exp_avg_scales, exp_avg_sqs, exp_avg_sq_scales,
                       grads,   grad_scales, grad_amax,      steps,       hyper,
                       skipped, remainders,  seconds,        seeds};
  check(a);
  check_distinct(kOp, {&weights, &exp_avgs, &exp_avg_scales, &exp_avg_sqs, &exp_avg_sq_scales,
                       &steps, &remainders});
  if (weights.empty()) return;
  const auto list = make_parameters<Adam4Parameter>(
      grads, grad_amax,
      [&](size_t i, const Tensor& grad, const float* amax) { return parameter(a, i, grad, amax); });
  auto* skips = static_cast<int64_t*>(data_of(kOp, "skipped", skipped, 1, ScalarType::Long));
  on_device(
      kOp, weights[0], [&] { cpu::adam4(list.data(), list.count(), skips); },
      [&](auto stream) {
        for (const Adam4Parameter& p : list.parameters) check_adam4(p);
        Tensor memory =
            workspace(weights[0], cuda::adam4_workspace_bytes(list.data(), list.count()));
        cuda::adam4(list.data(), list.count(), skips, memory.data_ptr(), stream);
      });
}

template <class Library>
void register_ops(Library& m) {
  m.impl("adam_4bit_", TORCH_BOX(&adam_4bit_));
}

}  // namespace

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
