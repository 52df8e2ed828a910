#include "quaver/grad.h"

#include <tuple>

#include "device.h"

namespace quaver::binding {
namespace {

std::tuple<Tensor, Tensor> grad_norm(const std::vector<Tensor>& grads,
                                     const std::vector<Tensor>& scales,
                                     const std::vector<Tensor>& amaxes) {
  const size_t n = grads.size();
  QUAVER_CHECK(n > 0, "grad_norm: no gradients");
  QUAVER_CHECK(scales.size() == n && amaxes.size() == n, "grad_norm: ", n, " gradients with ",
               scales.size(), " scales and ", amaxes.size(), " amaxes");
  check_device("grad_norm", grads[0], "grads", grads);
  check_device("grad_norm", grads[0], "scales", scales);
  check_device("grad_norm", grads[0], "amaxes", amaxes);
  std::vector<Tensor> kept(n);
  std::vector<ScaledView> views(n);
  for (size_t i = 0; i < n; ++i) {
    kept[i] = dense(grads[i]);
    views[i].values = view("grad_norm", "grad", kept[i]);
    views[i].scale = optional_scalar("grad_norm", "scale", scales[i]);
    views[i].amax = optional_scalar("grad_norm", "amax", amaxes[i]);
  }
  Tensor norm = empty(grads[0], {}, ScalarType::Float);
  Tensor amax = empty(grads[0], {static_cast<int64_t>(n)}, ScalarType::Float);
  auto* norm_out = static_cast<float*>(norm.data_ptr());
  auto* amax_out = static_cast<float*>(amax.data_ptr());
  const auto count = static_cast<int64_t>(n);
  on_device(
      "grad_norm", grads[0], [&] { cpu::grad_norm(norm_out, amax_out, views.data(), count); },
      [&](auto stream) {
        Tensor memory = workspace(grads[0], cuda::grad_norm_workspace_bytes(views.data(), count));
        cuda::grad_norm(norm_out, amax_out, views.data(), count, memory.data_ptr(), stream);
      });
  return {norm, amax};
}

void accumulate_(Tensor q, Tensor scale, Tensor amax, const Tensor& other_in,
                 const OptionalTensor& other_scale, const OptionalTensor& other_amax) {
  const char* op = "accumulate_";
  const Tensor other = dense(other_in);
  ScaledView b;
  b.values = view(op, "other", other);
  if (other_scale.has_value()) b.scale = scalar(op, "other_scale", *other_scale);
  if (other_amax.has_value()) b.amax = scalar(op, "other_amax", *other_amax);
  check_device(op, q, "scale", scale);
  check_device(op, q, "amax", amax);
  check_device(op, q, "other", other);
  check_device(op, q, "other_scale", other_scale);
  check_device(op, q, "other_amax", other_amax);
  const TensorView target = view(op, "q", q);
  float *target_scale = scalar(op, "scale", scale), *target_amax = scalar(op, "amax", amax);
  on_device(
      op, q, [&] { cpu::accumulate(target, target_scale, target_amax, b); },
      [&](auto stream) {
        Tensor memory = workspace(q, cuda::kAccumulateWorkspaceBytes);
        cuda::accumulate(target, target_scale, target_amax, b, memory.data_ptr(), stream);
      });
}

template <class Library>
void register_ops(Library& m) {
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
  m.impl("accumulate_", TORCH_BOX(&accumulate_));
}

}  // namespace

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
