#include "quaver/adam4.h"

#include "../check_adam4.h"
#include "device.h"

namespace quaver::binding {
namespace {

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

constexpr const char* kOp = "adam_4bit_";

// The data of `count` contiguous values of one type.
void* data_of(const char* name, const Tensor& t, int64_t count, ScalarType type) {
  QUAVER_CHECK(t.numel() == count && t.scalar_type() == type && t.is_contiguous(), kOp, ": ", name,
               " must be ", count, " contiguous ", torch::headeronly::toString(type), ", got ",
               t.numel(), " of ", torch::headeronly::toString(t.scalar_type()));
  check_aligned(kOp, name, t);
  return t.data_ptr();
}

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

template <class List>
void check_length(const char* name, const List& list, size_t wanted, bool optional) {
  QUAVER_CHECK(list.size() == wanted || (optional && list.empty()), kOp, ": wanted ", wanted, " ",
               name, ", got ", list.size());
}

void check(const Arguments& a) {
  const size_t n = a.weights.size();
  struct Row {
    const char* name;
    const Tensors& list;
    bool optional;
  };
  const Row rows[] = {
      {"weights", a.weights, false},
      {"exp_avgs", a.exp_avgs, false},
      {"exp_avg_scales", a.exp_avg_scales, false},
      {"exp_avg_sqs", a.exp_avg_sqs, false},
      {"exp_avg_sq_scales", a.exp_avg_sq_scales, false},
      {"grads", a.grads, false},
      {"grad_scales", a.grad_scales, false},
      {"steps", a.steps, false},
      {"remainders", a.remainders, true},
  };
  for (const Row& row : rows) {
    check_length(row.name, row.list, n, row.optional);
    if (n > 0) check_device(kOp, a.weights[0], row.name, row.list);
  }
  check_length("seconds", a.seconds, n, false);
  check_length("seeds", a.seeds, n, true);
  if (n == 0) return;
  check_device(kOp, a.weights[0], "grad_amax", a.grad_amax);
  check_device(kOp, a.weights[0], "hyper", a.hyper);
  check_device(kOp, a.weights[0], "skipped", a.skipped);
  const auto count = static_cast<int64_t>(n);
  QUAVER_CHECK(a.grad_amax.numel() == count && a.grad_amax.scalar_type() == ScalarType::Float, kOp,
               ": grad_amax must be ", count, " float32, got ", a.grad_amax.numel(), " of ",
               torch::headeronly::toString(a.grad_amax.scalar_type()));
  QUAVER_CHECK(a.hyper.dim() == 2 && a.hyper.size(0) == count && a.hyper.size(1) == 5 &&
                   a.hyper.scalar_type() == ScalarType::Double && a.hyper.is_contiguous(),
               kOp, ": hyper must be contiguous [", count,
               ", 5] float64 (lr, beta1, beta2, eps, decay)");
  check_aligned(kOp, "hyper", a.hyper);
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
  void* code = data_of("exp_avg_sq", a.exp_avg_sqs[i], codes, ScalarType::Byte);
  p->exp_avg_sq = codes > 0 ? static_cast<uint8_t*>(code) : nullptr;
  p->exp_avg_sq_scale = static_cast<float*>(
      data_of("exp_avg_sq_scale", a.exp_avg_sq_scales[i], scales, ScalarType::Float));
}

// Parameter i. `grad` and `grad_amax` are contiguous.
Adam4Parameter parameter(const Arguments& a, size_t i, const Tensor& grad, const float* grad_amax) {
  Adam4Parameter p;
  p.weight = view(kOp, "weight", a.weights[i]);
  const int64_t n = p.weight.numel();
  p.exp_avg =
      static_cast<uint8_t*>(data_of("exp_avg", a.exp_avgs[i], (n + 1) / 2, ScalarType::Byte));
  p.exp_avg_scale = static_cast<float*>(
      data_of("exp_avg_scale", a.exp_avg_scales[i], group_count(n), ScalarType::Float));
  read_second(a, i, n, &p);
  if (!a.remainders.empty() && a.remainders[i].numel() > 0)
    p.remainder =
        static_cast<uint16_t*>(data_of("remainder", a.remainders[i], n, ScalarType::Short));
  p.stochastic = !a.seeds.empty() && a.seeds[i] >= 0;
  p.seed = p.stochastic ? static_cast<uint64_t>(a.seeds[i]) : 0;
  p.grad = view(kOp, "grad", grad);
  p.grad_scale = optional_scalar(kOp, "grad_scale", a.grad_scales[i]);
  p.grad_amax = grad_amax + i;
  p.step = static_cast<int64_t*>(data_of("step", a.steps[i], 1, ScalarType::Long));
  p.hyper = static_cast<const double*>(a.hyper.data_ptr()) + 5 * i;
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
  const size_t n = weights.size();
  if (n == 0) return;
  const Tensor amax = dense(grad_amax);
  Tensors dense_grads(n);
  std::vector<Adam4Parameter> parameters(n);
  for (size_t i = 0; i < n; ++i) {
    dense_grads[i] = dense(grads[i]);
    parameters[i] = parameter(a, i, dense_grads[i], static_cast<const float*>(amax.data_ptr()));
  }
  auto* skips = static_cast<int64_t*>(data_of("skipped", skipped, 1, ScalarType::Long));
  const auto count = static_cast<int64_t>(n);
  on_device(
      kOp, weights[0], [&] { cpu::adam4(parameters.data(), count, skips); },
      [&](auto stream) {
        for (const Adam4Parameter& p : parameters) check_adam4(p);
        Tensor memory =
            workspace(weights[0], cuda::adam4_workspace_bytes(parameters.data(), count));
        cuda::adam4(parameters.data(), count, skips, memory.data_ptr(), stream);
      });
}

template <class Library>
void register_ops(Library& m) {
  m.impl("adam_4bit_", TORCH_BOX(&adam_4bit_));
}

}  // namespace

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
