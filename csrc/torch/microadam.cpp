#include "quaver/microadam.h"

#include "../check_microadam.h"
#include "device.h"

namespace quaver::binding {
namespace {

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

constexpr const char* kOp = "micro_adam_";

// The data of `count` contiguous values of one type; null of none.
void* data_of(const char* name, const Tensor& t, int64_t count, ScalarType type) {
  QUAVER_CHECK(t.numel() == count && t.scalar_type() == type && t.is_contiguous(), kOp, ": ", name,
               " must be ", count, " contiguous ", torch::headeronly::toString(type), ", got ",
               t.numel(), " of ", torch::headeronly::toString(t.scalar_type()));
  check_aligned(kOp, name, t);
  return t.data_ptr();
}

// The arguments as the schema has them.
struct Arguments {
  const Tensors &weights, &indices, &values, &errors, &ranges, &grads, &grad_scales;
  const Tensor& grad_amax;
  const Tensors& steps;
  const Tensor &hyper, &skipped;
  const Tensors& remainders;
  const Ints &kept, &error_blocks, &seeds;
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
      {"weights", a.weights, false},         {"indices", a.indices, false},
      {"values", a.values, false},           {"errors", a.errors, false},
      {"ranges", a.ranges, false},           {"grads", a.grads, false},
      {"grad_scales", a.grad_scales, false}, {"steps", a.steps, false},
      {"remainders", a.remainders, true},
  };
  for (const Row& row : rows) {
    check_length(row.name, row.list, n, row.optional);
    if (n > 0) check_device(kOp, a.weights[0], row.name, row.list);
  }
  check_length("kept", a.kept, n, false);
  check_length("error_blocks", a.error_blocks, n, false);
  check_length("seeds", a.seeds, n, true);
  if (n == 0) return;
  check_device(kOp, a.weights[0], "grad_amax", a.grad_amax);
  check_device(kOp, a.weights[0], "hyper", a.hyper);
  check_device(kOp, a.weights[0], "skipped", a.skipped);
  const auto count = static_cast<int64_t>(n);
  QUAVER_CHECK(a.grad_amax.numel() == count && a.grad_amax.scalar_type() == ScalarType::Float, kOp,
               ": grad_amax must be ", count, " float32, got ", a.grad_amax.numel(), " of ",
               torch::headeronly::toString(a.grad_amax.scalar_type()));
  QUAVER_CHECK(a.hyper.dim() == 2 && a.hyper.size(0) == count && a.hyper.size(1) == kMicroHyper &&
                   a.hyper.scalar_type() == ScalarType::Double && a.hyper.is_contiguous(),
               kOp, ": hyper must be contiguous [", count, ", ", kMicroHyper,
               "] float64 (lr, beta1, beta2, eps, decay, alpha)");
  check_aligned(kOp, "hyper", a.hyper);
}

void read_ring(const Tensor& index, const Tensor& value, MicroAdamParameter* p) {
  QUAVER_CHECK(index.dim() == 2, kOp, ": an index must be [window, row], got ", index.dim(),
               " dimensions");
  p->window = index.size(0);
  p->row = index.size(1);
  p->index = static_cast<int16_t*>(data_of("index", index, index.numel(), ScalarType::Short));
  p->value = static_cast<bf16*>(data_of("value", value, index.numel(), ScalarType::BFloat16));
}

// Parameter i. `grad` and `grad_amax` are contiguous.
MicroAdamParameter parameter(const Arguments& a, size_t i, const Tensor& grad,
                             const float* grad_amax) {
  MicroAdamParameter p;
  p.weight = view(kOp, "weight", a.weights[i]);
  const int64_t n = p.weight.numel();
  p.error_block = a.error_blocks[i];
  check_error_block(p.error_block);
  p.kept = a.kept[i];
  read_ring(a.indices[i], a.values[i], &p);
  p.error = static_cast<uint8_t*>(data_of("error", a.errors[i], (n + 1) / 2, ScalarType::Byte));
  p.range = static_cast<bf16*>(
      data_of("range", a.ranges[i], 2 * error_block_count(n, p.error_block), ScalarType::BFloat16));
  if (!a.remainders.empty() && a.remainders[i].numel() > 0)
    p.remainder =
        static_cast<uint16_t*>(data_of("remainder", a.remainders[i], n, ScalarType::Short));
  p.stochastic = !a.seeds.empty() && a.seeds[i] >= 0;
  p.seed = p.stochastic ? static_cast<uint64_t>(a.seeds[i]) : 0;
  p.grad = view(kOp, "grad", grad);
  p.grad_scale = optional_scalar(kOp, "grad_scale", a.grad_scales[i]);
  p.grad_amax = grad_amax + i;
  p.step = static_cast<int64_t*>(data_of("step", a.steps[i], 1, ScalarType::Long));
  p.hyper = static_cast<const double*>(a.hyper.data_ptr()) + kMicroHyper * i;
  return p;
}

void micro_adam_(const Tensors& weights, const Tensors& indices, const Tensors& values,
                 const Tensors& errors, const Tensors& ranges, const Tensors& grads,
                 const Tensors& grad_scales, const Tensor& grad_amax, const Tensors& steps,
                 const Tensor& hyper, Tensor skipped, const Tensors& remainders, const Ints& kept,
                 const Ints& error_blocks, const Ints& seeds) {
  const Arguments a = {weights, indices,     values,    errors,       ranges,
                       grads,   grad_scales, grad_amax, steps,        hyper,
                       skipped, remainders,  kept,      error_blocks, seeds};
  check(a);
  check_distinct(kOp, {&weights, &indices, &values, &errors, &ranges, &steps, &remainders});
  const size_t n = weights.size();
  if (n == 0) return;
  const Tensor amax = dense(grad_amax);
  Tensors dense_grads(n);
  std::vector<MicroAdamParameter> parameters(n);
  for (size_t i = 0; i < n; ++i) {
    dense_grads[i] = dense(grads[i]);
    parameters[i] = parameter(a, i, dense_grads[i], static_cast<const float*>(amax.data_ptr()));
  }
  auto* skips = static_cast<int64_t*>(data_of("skipped", skipped, 1, ScalarType::Long));
  const auto count = static_cast<int64_t>(n);
  on_device(
      kOp, weights[0], [&] { cpu::micro_adam(parameters.data(), count, skips); },
      [&](auto stream) {
        for (const MicroAdamParameter& p : parameters) check_micro_adam(p);
        Tensor memory =
            workspace(weights[0], cuda::micro_adam_workspace_bytes(parameters.data(), count));
        cuda::micro_adam(parameters.data(), count, skips, memory.data_ptr(), stream);
      });
}

template <class Library>
void register_ops(Library& m) {
  m.impl("micro_adam_", TORCH_BOX(&micro_adam_));
}

}  // namespace

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
