#include "quaver/optimizer.h"

#include "list_op.h"

namespace quaver::binding {
namespace {

constexpr const char* kOp = "adam_";
constexpr size_t kStates = 3;  // weight, exp_avg, exp_avg_sq
constexpr const char* kNames[kStates] = {"weight", "exp_avg", "exp_avg_sq"};

StateView state(const char* name, const Tensor& values, const Tensor& scale, const Tensor& amax,
                int64_t scaling) {
  QUAVER_CHECK(scaling >= 0 && scaling <= static_cast<int64_t>(Scaling::expand), kOp, ": ", name,
               " has scaling ", scaling, ", wanted 0 (tensor), 1 (group) or 2 (expand)");
  StateView s;
  s.values = view(kOp, name, values);
  s.scaling = static_cast<Scaling>(scaling);
  if (s.scaling == Scaling::tensor) {
    s.scale = optional_scalar(kOp, "scale", scale);
    s.amax = optional_scalar(kOp, "amax", amax);
    return s;
  }
  const int64_t groups = group_count(s.values.numel());
  QUAVER_CHECK(
      scale.numel() == groups && scale.scalar_type() == ScalarType::Float && scale.is_contiguous(),
      kOp, ": ", name, " of ", s.values.numel(), " values needs ", groups,
      " contiguous float32 scales, got ", scale.numel(), " of ",
      torch::headeronly::toString(scale.scalar_type()));
  check_aligned(kOp, "scale", scale);
  s.scale = static_cast<float*>(scale.data_ptr());
  return s;
}

// One int64 of the device, which the step counts up.
int64_t* counter(const char* name, const Tensor& t) {
  QUAVER_CHECK(t.numel() == 1 && t.scalar_type() == ScalarType::Long, kOp, ": ", name,
               " must be one int64, got ", t.numel(), " of ",
               torch::headeronly::toString(t.scalar_type()));
  check_aligned(kOp, name, t);
  return static_cast<int64_t*>(t.data_ptr());
}

// The arguments as the schema has them. `values`, `scales` and `amaxes` hold all weights, then all
// exp_avgs, then all exp_avg_sqs; `copies` all q, then all qt, then all scales.
struct Arguments {
  const Tensors &values, &scales, &amaxes, &grads, &grad_scales;
  const Tensor& grad_amax;
  const Tensors& steps;
  const Tensor &hyper, &skipped;
  const Tensors &copies, &remainders, &subset_sums;
  const Ints &scalings, &seeds, &first_elements, &subsets;
};

void check(const Arguments& a) {
  const size_t n = a.steps.size();
  const NamedList lists[] = {
      {"values", a.values, kStates * n},       {"scales", a.scales, kStates * n},
      {"amaxes", a.amaxes, kStates * n},       {"grads", a.grads, n},
      {"grad_scales", a.grad_scales, n},       {"steps", a.steps, n},
      {"copies", a.copies, kStates * n, true}, {"remainders", a.remainders, n, true},
      {"subset_sums", a.subset_sums, n, true},
  };
  check_lists(kOp, lists);
  check_length(kOp, "scalings", a.scalings, kStates * n, true);
  check_length(kOp, "seeds", a.seeds, n, true);
  check_length(kOp, "first_elements", a.first_elements, n, true);
  check_length(kOp, "subsets", a.subsets, n, true);
  if (n == 0) return;
  check_step(kOp, a.values[0], n, a.grad_amax, a.hyper, a.skipped, 5,
             "lr, beta1, beta2, eps, decay");
}

// Parameter i. `grad` and `grad_amax` are contiguous.
AdamParameter parameter(const Arguments& a, size_t i, const Tensor& grad, const float* grad_amax) {
  const size_t n = a.steps.size();
  AdamParameter p;
  StateView* states[kStates] = {&p.weight, &p.exp_avg, &p.exp_avg_sq};
  for (size_t k = 0, j = i; k < kStates; ++k, j += n)
    *states[k] = state(kNames[k], a.values[j], a.scales[j], a.amaxes[j],
                       a.scalings.empty() ? 0 : a.scalings[j]);
  p.remainder = remainder_of(kOp, a.remainders, i, p.weight.values.numel());
  if (!a.subsets.empty()) p.subsets = subsets_of(kOp, a.subsets[i]);
  if (p.subsets.width != 0 && !a.subset_sums.empty())
    p.subset_sums = static_cast<const float*>(
        data_of(kOp, "subset_sums", a.subset_sums[i],
                subset_count(p.subsets, p.weight.values.numel()), ScalarType::Float));
  p.first_element = a.first_elements.empty() ? 0 : a.first_elements[i];
  read_step(kOp, i, grad, a.grad_scales[i], grad_amax, a.seeds, a.hyper, &p);
  if (!a.copies.empty() && a.copies[i].numel() > 0) {
    p.fp8 = view(kOp, "q of copies", a.copies[i]);
    p.fp8_t = view(kOp, "qt of copies", a.copies[n + i]);
    p.fp8_scale = scalar(kOp, "scale of copies", a.copies[2 * n + i]);
  }
  p.step = counter("step", a.steps[i]);
  return p;
}

void adam_(const Tensors& values, const Tensors& scales, const Tensors& amaxes,
           const Tensors& grads, const Tensors& grad_scales, const Tensor& grad_amax,
           const Tensors& steps, const Tensor& hyper, Tensor skipped, const Tensors& copies,
           const Tensors& remainders, const Tensors& subset_sums, const Ints& scalings,
           const Ints& seeds, const Ints& first_elements, const Ints& subsets) {
  const Arguments a = {values,   scales, amaxes,         grads,  grad_scales, grad_amax,
                       steps,    hyper,  skipped,        copies, remainders,  subset_sums,
                       scalings, seeds,  first_elements, subsets};
  check(a);
  check_distinct(kOp, {&values, &scales, &amaxes, &steps, &copies, &remainders});
  if (steps.empty()) return;
  const auto list = make_parameters<AdamParameter>(
      grads, grad_amax,
      [&](size_t i, const Tensor& grad, const float* amax) { return parameter(a, i, grad, amax); });
  auto* skips = counter("skipped", skipped);
  on_device(
      kOp, values[0], [&] { cpu::adam(list.data(), list.count(), skips); },
      [&](auto stream) {
        Tensor memory = workspace(values[0], cuda::adam_workspace_bytes(list.data(), list.count()));
        cuda::adam(list.data(), list.count(), skips, memory.data_ptr(), stream);
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) { m.impl(kOp, TORCH_BOX(&adam_)); }
#if defined(QUAVER_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(quaver, CUDA, m) { m.impl(kOp, TORCH_BOX(&adam_)); }
#endif

}  // namespace quaver::binding
