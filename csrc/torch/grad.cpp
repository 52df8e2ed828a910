#include "quaver/grad.h"

#include <tuple>

#include "bridge.h"

namespace quaver::binding {
namespace {

std::tuple<Tensor, Tensor> grad_norm_cpu(const std::vector<Tensor>& grads,
                                         const std::vector<Tensor>& scales,
                                         const std::vector<Tensor>& amaxes) {
  const size_t n = grads.size();
  QUAVER_CHECK(n > 0, "grad_norm: no gradients");
  QUAVER_CHECK(scales.size() == n && amaxes.size() == n, "grad_norm: ", n, " gradients with ",
               scales.size(), " scales and ", amaxes.size(), " amaxes");
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
  cpu::grad_norm(static_cast<float*>(norm.data_ptr()), static_cast<float*>(amax.data_ptr()),
                 views.data(), static_cast<int64_t>(n));
  return {norm, amax};
}

void accumulate_cpu_(Tensor q, Tensor scale, Tensor amax, const Tensor& other_in,
                     const OptionalTensor& other_scale, const OptionalTensor& other_amax) {
  const char* op = "accumulate_";
  const Tensor other = dense(other_in);
  ScaledView b;
  b.values = view(op, "other", other);
  if (other_scale.has_value()) b.scale = scalar(op, "other_scale", *other_scale);
  if (other_amax.has_value()) b.amax = scalar(op, "other_amax", *other_amax);
  cpu::accumulate(view(op, "q", q), scalar(op, "scale", scale), scalar(op, "amax", amax), b);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) {
  m.impl("grad_norm", TORCH_BOX(&grad_norm_cpu));
  m.impl("accumulate_", TORCH_BOX(&accumulate_cpu_));
}

}  // namespace quaver::binding
