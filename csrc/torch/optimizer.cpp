#include "quaver/optimizer.h"

#include "device.h"

namespace quaver::binding {
namespace {

using Tensors = std::vector<Tensor>;

using Ints = std::vector<int64_t>;

constexpr size_t kStates = 3;  // weight, exp_avg, exp_avg_sq
constexpr const char* kNames[kStates] = {"weight", "exp_avg", "exp_avg_sq"};

StateView state(const char* name, const Tensor& values, const Tensor& scale, const Tensor& amax,
                int64_t scaling) {
  QUAVER_CHECK(scaling >= 0 && scaling <= static_cast<int64_t>(Scaling::expand), "adam_: ", name,
               " has scaling ", scaling, ", wanted 0 (tensor), 1 (group) or 2 (expand)");
  StateView s;
  s.values = view("adam_", name, values);
  s.scaling = static_cast<Scaling>(scaling);
  if (s.scaling == Scaling::tensor) {
    s.scale = optional_scalar("adam_", "scale", scale);
    s.amax = optional_scalar("adam_", "amax", amax);
    return s;
  }
  const int64_t groups = group_count(s.values.numel());
  QUAVER_CHECK(
      scale.numel() == groups && scale.scalar_type() == ScalarType::Float && scale.is_contiguous(),
      "adam_: ", name, " of ", s.values.numel(), " values needs ", groups,
      " contiguous float32 scales, got ", scale.numel(), " of ",
      torch::headeronly::toString(scale.scalar_type()));
  check_aligned("adam_", "scale", scale);
  s.scale = static_cast<float*>(scale.data_ptr());
  return s;
}

uint16_t* remainder(const Tensor& t, int64_t numel) {
  if (t.numel() == 0) return nullptr;
  QUAVER_CHECK(t.numel() == numel && t.scalar_type() == ScalarType::Short && t.is_contiguous(),
               "adam_: a remainder must be ", numel, " contiguous int16, got ", t.numel(), " of ",
               torch::headeronly::toString(t.scalar_type()));
  check_aligned("adam_", "remainder", t);
  return static_cast<uint16_t*>(t.data_ptr());
}

// One int64 of the device, which the step counts up.
int64_t* counter(const char* name, const Tensor& t) {
  QUAVER_CHECK(t.numel() == 1 && t.scalar_type() == ScalarType::Long, "adam_: ", name,
               " must be one int64, got ", t.numel(), " of ",
               torch::headeronly::toString(t.scalar_type()));
  check_aligned("adam_", name, t);
  return static_cast<int64_t*>(t.data_ptr());
}

// The arguments as the schema has them. `values`, `scales` and `amaxes` hold all weights, then all
// exp_avgs, then all exp_avg_sqs; `copies` all q, then all qt, then all scales.
struct Arguments {
  const Tensors &values, &scales, &amaxes, &grads, &grad_scales;
  const Tensor& grad_amax;
  const Tensors& steps;
  const Tensor &hyper, &skipped;
  const Tensors &copies, &remainders;
  const Ints &scalings, &seeds, &first_elements, &subsets;
};

template <class List>
void check_length(const char* name, const List& list, size_t wanted, bool optional) {
  QUAVER_CHECK(list.size() == wanted || (optional && list.empty()), "adam_: wanted ", wanted, " ",
               name, ", got ", list.size());
}

void check(const Arguments& a) {
  const size_t n = a.steps.size();
  struct Row {
    const char* name;
    const Tensors& list;
    size_t size;
    bool optional;
  };
  const Row rows[] = {
      {"values", a.values, kStates * n, false}, {"scales", a.scales, kStates * n, false},
      {"amaxes", a.amaxes, kStates * n, false}, {"grads", a.grads, n, false},
      {"grad_scales", a.grad_scales, n, false}, {"steps", a.steps, n, false},
      {"copies", a.copies, kStates * n, true},  {"remainders", a.remainders, n, true},
  };
  for (const Row& row : rows) {
    check_length(row.name, row.list, row.size, row.optional);
    if (n > 0) check_device("adam_", a.values[0], row.name, row.list);
  }
  check_length("scalings", a.scalings, kStates * n, true);
  check_length("seeds", a.seeds, n, true);
  check_length("first_elements", a.first_elements, n, true);
  check_length("subsets", a.subsets, n, true);
  if (n == 0) return;
  check_device("adam_", a.values[0], "grad_amax", a.grad_amax);
  check_device("adam_", a.values[0], "hyper", a.hyper);
  check_device("adam_", a.values[0], "skipped", a.skipped);
  const auto count = static_cast<int64_t>(n);
  QUAVER_CHECK(a.grad_amax.numel() == count && a.grad_amax.scalar_type() == ScalarType::Float,
               "adam_: grad_amax must be ", count, " float32, got ", a.grad_amax.numel(), " of ",
               torch::headeronly::toString(a.grad_amax.scalar_type()));
  QUAVER_CHECK(a.hyper.dim() == 2 && a.hyper.size(0) == count && a.hyper.size(1) == 5 &&
                   a.hyper.scalar_type() == ScalarType::Double && a.hyper.is_contiguous(),
               "adam_: hyper must be contiguous [", count,
               ", 5] float64 (lr, beta1, beta2, eps, decay)");
  check_aligned("adam_", "hyper", a.hyper);
}

// Parameter i. `grad` and `grad_amax` are contiguous.
AdamParameter parameter(const Arguments& a, size_t i, const Tensor& grad, const float* grad_amax) {
  const size_t n = a.steps.size();
  AdamParameter p;
  StateView* states[kStates] = {&p.weight, &p.exp_avg, &p.exp_avg_sq};
  for (size_t k = 0, j = i; k < kStates; ++k, j += n)
    *states[k] = state(kNames[k], a.values[j], a.scales[j], a.amaxes[j],
                       a.scalings.empty() ? 0 : a.scalings[j]);
  if (!a.remainders.empty()) p.remainder = remainder(a.remainders[i], p.weight.values.numel());
  p.stochastic = !a.seeds.empty() && a.seeds[i] >= 0;
  p.seed = p.stochastic ? static_cast<uint64_t>(a.seeds[i]) : 0;
  if (!a.subsets.empty()) {
    const int64_t width = a.subsets[i];
    QUAVER_CHECK(width > INT64_MIN, "adam_: subsets must be above -2^63, got ", width);
    p.subsets = {width < 0 ? -width : width, width < 0};
  }
  p.first_element = a.first_elements.empty() ? 0 : a.first_elements[i];
  p.grad = view("adam_", "grad", grad);
  p.grad_scale = optional_scalar("adam_", "grad_scale", a.grad_scales[i]);
  p.grad_amax = grad_amax + i;
  if (!a.copies.empty() && a.copies[i].numel() > 0) {
    p.fp8 = view("adam_", "q of copies", a.copies[i]);
    p.fp8_t = view("adam_", "qt of copies", a.copies[n + i]);
    p.fp8_scale = scalar("adam_", "scale of copies", a.copies[2 * n + i]);
  }
  p.step = counter("step", a.steps[i]);
  p.hyper = static_cast<const double*>(a.hyper.data_ptr()) + 5 * i;
  return p;
}

void adam_(const Tensors& values, const Tensors& scales, const Tensors& amaxes,
           const Tensors& grads, const Tensors& grad_scales, const Tensor& grad_amax,
           const Tensors& steps, const Tensor& hyper, Tensor skipped, const Tensors& copies,
           const Tensors& remainders, const Ints& scalings, const Ints& seeds,
           const Ints& first_elements, const Ints& subsets) {
  const Arguments a = {values,     scales,   amaxes, grads,          grad_scales,
                       grad_amax,  steps,    hyper,  skipped,        copies,
                       remainders, scalings, seeds,  first_elements, subsets};
  check(a);
  check_distinct("adam_", {&values, &scales, &amaxes, &steps, &copies, &remainders});
  const size_t n = steps.size();
  if (n == 0) return;
  const Tensor amax = dense(grad_amax);
  Tensors kept(n);
  std::vector<AdamParameter> parameters(n);
  for (size_t i = 0; i < n; ++i) {
    kept[i] = dense(grads[i]);
    parameters[i] = parameter(a, i, kept[i], static_cast<const float*>(amax.data_ptr()));
  }
  auto* skips = counter("skipped", skipped);
  const auto count = static_cast<int64_t>(n);
  on_device(
      "adam_", values[0], [&] { cpu::adam(parameters.data(), count, skips); },
      [&](auto stream) {
        Tensor memory = workspace(values[0], cuda::adam_workspace_bytes(count));
        cuda::adam(parameters.data(), count, skips, memory.data_ptr(), stream);
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) { m.impl("adam_", TORCH_BOX(&adam_)); }
#if defined(QUAVER_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(quaver, CUDA, m) { m.impl("adam_", TORCH_BOX(&adam_)); }
#endif

}  // namespace quaver::binding
