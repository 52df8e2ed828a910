#include "quaver/microadam.h"

#include "../check_microadam.h"
#include "list_op.h"

namespace quaver::binding {
namespace {

constexpr const char* kOp = "micro_adam_";

// The arguments as the schema has them.
struct Arguments {
  const Tensors &weights, &indices, &values, &errors, &ranges, &grads, &grad_scales;
  const Tensor& grad_amax;
  const Tensors& steps;
  const Tensor &hyper, &skipped;
  const Tensors& remainders;
  const Ints &kept, &error_blocks, &seeds;
};

void check(const Arguments& a) {
  const size_t n = a.weights.size();
  const NamedList lists[] = {
      {"weights", a.weights, n},
      {"indices", a.indices, n},
      {"values", a.values, n},
      {"errors", a.errors, n},
      {"ranges", a.ranges, n},
      {"grads", a.grads, n},
      {"grad_scales", a.grad_scales, n},
      {"steps", a.steps, n},
      {"remainders", a.remainders, n, true},
  };
  check_lists(kOp, lists);
  check_length(kOp, "kept", a.kept, n);
  check_length(kOp, "error_blocks", a.error_blocks, n);
  check_length(kOp, "seeds", a.seeds, n, true);
  if (n == 0) return;
  check_step(kOp, a.weights[0], n, a.grad_amax, a.hyper, a.skipped, kMicroHyper,
             "lr, beta1, beta2, eps, decay, alpha");
}

void read_ring(const Tensor& index, const Tensor& value, MicroAdamParameter* p) {
  QUAVER_CHECK(index.dim() == 2, kOp, ": an index must be [window, row], got ", index.dim(),
               " dimensions");
  p->window = index.size(0);
  p->row = index.size(1);
  p->index = static_cast<int16_t*>(data_of(kOp, "index", index, index.numel(), ScalarType::Short));
  p->value = static_cast<bf16*>(data_of(kOp, "value", value, index.numel(), ScalarType::BFloat16));
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
  p.error =
      static_cast<uint8_t*>(data_of(kOp, "error", a.errors[i], (n + 1) / 2, ScalarType::Byte));
  p.range = static_cast<bf16*>(data_of(
      kOp, "range", a.ranges[i], 2 * error_block_count(n, p.error_block), ScalarType::BFloat16));
  p.remainder = remainder_of(kOp, a.remainders, i, n);
  read_step(kOp, i, grad, a.grad_scales[i], grad_amax, a.seeds, a.hyper, &p);
  p.step = static_cast<int64_t*>(data_of(kOp, "step", a.steps[i], 1, ScalarType::Long));
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
  if (weights.empty()) return;
  const auto list = make_parameters<MicroAdamParameter>(
      grads, grad_amax,
      [&](size_t i, const Tensor& grad, const float* amax) { return parameter(a, i, grad, amax); });
  auto* skips = static_cast<int64_t*>(data_of(kOp, "skipped", skipped, 1, ScalarType::Long));
  on_device(
      kOp, weights[0], [&] { cpu::micro_adam(list.data(), list.count(), skips); },
      [&](auto stream) {
        for (const MicroAdamParameter& p : list.parameters) check_micro_adam(p);
        Tensor memory =
            workspace(weights[0], cuda::micro_adam_workspace_bytes(list.data(), list.count()));
        cuda::micro_adam(list.data(), list.count(), skips, memory.data_ptr(), stream);
      });
}

template <class Library>
void register_ops(Library& m) {
  m.impl("micro_adam_", TORCH_BOX(&micro_adam_));
}

}  // namespace

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
