#include "quaver/subset.h"

#include <tuple>

#include "../check_subset.h"
#include "list_op.h"

namespace quaver::binding {
namespace {

constexpr const char* kOp = "subset_sums";

SubsetGrad request(const Tensor& grad, const Tensor& scale, const Tensor& amax, int64_t width) {
  SubsetGrad g;
  g.grad.values = view(kOp, "grad", grad);
  g.grad.scale = optional_scalar(kOp, "scale", scale);
  g.grad.amax = optional_scalar(kOp, "amax", amax);
  g.subsets = subsets_of(kOp, width);
  check_subset_width(kOp, g.subsets, g.grad.values.numel());
  return g;
}

std::tuple<Tensor, Tensor> subset_sums(const Tensors& grads, const Tensors& scales,
                                       const Tensors& amaxes, const Ints& subsets) {
  const size_t n = grads.size();
  QUAVER_CHECK(n > 0, kOp, ": no gradients");
  const NamedList lists[] = {{"grads", grads, n}, {"scales", scales, n}, {"amaxes", amaxes, n}};
  check_lists(kOp, lists);
  check_length(kOp, "subsets", subsets, n);
  Tensors kept(n);
  std::vector<SubsetGrad> list(n);
  int64_t total = 0;
  for (size_t i = 0; i < n; ++i) {
    kept[i] = dense(grads[i]);
    list[i] = request(kept[i], scales[i], amaxes[i], subsets[i]);
    total += subset_count(list[i].subsets, list[i].grad.values.numel());
  }
  const auto count = static_cast<int64_t>(n);
  Tensor amax = empty(grads[0], {count}, ScalarType::Float);
  Tensor sums = empty(grads[0], {total}, ScalarType::Float);
  auto* next = static_cast<float*>(sums.data_ptr());
  for (SubsetGrad& g : list) {
    g.sums = next;
    next += subset_count(g.subsets, g.grad.values.numel());
  }
  auto* amax_out = static_cast<float*>(amax.data_ptr());
  on_device(
      kOp, grads[0], [&] { cpu::subset_sums(amax_out, list.data(), count); },
      [&](auto stream) {
        Tensor memory = workspace(grads[0], cuda::subset_sums_workspace_bytes(list.data(), count));
        cuda::subset_sums(amax_out, list.data(), count, memory.data_ptr(), stream);
      });
  return {amax, sums};
}

template <class Library>
void register_ops(Library& m) {
  m.impl(kOp, TORCH_BOX(&subset_sums));
}

}  // namespace

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
