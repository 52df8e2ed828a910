#include "quaver/optimizer.h"

#include <initializer_list>
#include <utility>

#include "device.h"

namespace quaver::binding {
namespace {

using Tensors = std::vector<Tensor>;

using Ints = std::vector<int64_t>;

StateView state(const char* name, const Tensor& values, const Tensor& scale, const Tensor& amax,
                int64_t scaling = 0) {
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
  s.scale = static_cast<float*>(scale.data_ptr());
  return s;
}

uint16_t* remainder(const Tensor& t, int64_t numel) {
  if (t.numel() == 0) return nullptr;
  QUAVER_CHECK(t.numel() == numel && t.scalar_type() == ScalarType::Short && t.is_contiguous(),
               "adam_: a remainder must be ", numel, " contiguous int16, got ", t.numel(), " of ",
               torch::headeronly::toString(t.scalar_type()));
  return static_cast<uint16_t*>(t.data_ptr());
}

void adam_(const Tensors& weights, const Tensors& weight_scales, const Tensors& weight_amaxes,
           const Tensors& exp_avgs, const Tensors& exp_avg_scales, const Tensors& exp_avg_amaxes,
           const Tensors& exp_avg_sqs, const Tensors& exp_avg_sq_scales,
           const Tensors& exp_avg_sq_amaxes, const Tensors& grads, const Tensors& grad_scales,
           const Tensor& grad_amax, const Tensors& fp8s, const Tensors& fp8_ts,
           const Tensors& fp8_scales, const Tensors& steps, const Tensor& hyper, Tensor skipped,
           const Tensors& remainders, const Ints& exp_avg_scaling, const Ints& exp_avg_sq_scaling,
           const Ints& seeds) {
  const size_t n = weights.size();
  if (n == 0) return;
  for (const auto& [name, list] : std::initializer_list<std::pair<const char*, const Tensors*>>{
           {"weights", &weights},
           {"weight_scales", &weight_scales},
           {"weight_amaxes", &weight_amaxes},
           {"exp_avgs", &exp_avgs},
           {"exp_avg_scales", &exp_avg_scales},
           {"exp_avg_amaxes", &exp_avg_amaxes},
           {"exp_avg_sqs", &exp_avg_sqs},
           {"exp_avg_sq_scales", &exp_avg_sq_scales},
           {"exp_avg_sq_amaxes", &exp_avg_sq_amaxes},
           {"grads", &grads},
           {"grad_scales", &grad_scales},
           {"fp8s", &fp8s},
           {"fp8_ts", &fp8_ts},
           {"fp8_scales", &fp8_scales},
           {"steps", &steps}}) {
    QUAVER_CHECK(list->size() == n, "adam_: ", n, " weights, but ", list->size(), " ", name);
    check_device("adam_", weights[0], name, *list);
  }
  QUAVER_CHECK(remainders.empty() || remainders.size() == n, "adam_: ", n, " weights, but ",
               remainders.size(), " remainders");
  check_device("adam_", weights[0], "remainders", remainders);
  for (const auto& [name, list] : std::initializer_list<std::pair<const char*, const Ints*>>{
           {"exp_avg_scaling", &exp_avg_scaling},
           {"exp_avg_sq_scaling", &exp_avg_sq_scaling},
           {"seeds", &seeds}})
    QUAVER_CHECK(list->empty() || list->size() == n, "adam_: ", n, " weights, but ", list->size(),
                 " ", name);
  check_device("adam_", weights[0], "grad_amax", grad_amax);
  check_device("adam_", weights[0], "hyper", hyper);
  check_device("adam_", weights[0], "skipped", skipped);
  const auto count = static_cast<int64_t>(n);
  QUAVER_CHECK(grad_amax.numel() == count && grad_amax.scalar_type() == ScalarType::Float,
               "adam_: grad_amax must be ", count, " float32");
  QUAVER_CHECK(hyper.dim() == 2 && hyper.size(0) == count && hyper.size(1) == 5 &&
                   hyper.scalar_type() == ScalarType::Double && hyper.is_contiguous(),
               "adam_: hyper must be [", count, ", 5] float64 (lr, beta1, beta2, eps, decay)");
  QUAVER_CHECK(skipped.numel() == 1 && skipped.scalar_type() == ScalarType::Long,
               "adam_: skipped must be one int64");
  Tensors kept(n);
  std::vector<AdamParameter> parameters(n);
  for (size_t i = 0; i < n; ++i) {
    AdamParameter& p = parameters[i];
    p.weight = state("weight", weights[i], weight_scales[i], weight_amaxes[i]);
    p.exp_avg = state("exp_avg", exp_avgs[i], exp_avg_scales[i], exp_avg_amaxes[i],
                      exp_avg_scaling.empty() ? 0 : exp_avg_scaling[i]);
    p.exp_avg_sq = state("exp_avg_sq", exp_avg_sqs[i], exp_avg_sq_scales[i], exp_avg_sq_amaxes[i],
                         exp_avg_sq_scaling.empty() ? 0 : exp_avg_sq_scaling[i]);
    if (!remainders.empty()) p.remainder = remainder(remainders[i], p.weight.values.numel());
    p.stochastic = !seeds.empty() && seeds[i] >= 0;
    p.seed = p.stochastic ? static_cast<uint64_t>(seeds[i]) : 0;
    kept[i] = dense(grads[i]);
    p.grad = view("adam_", "grad", kept[i]);
    p.grad_scale = optional_scalar("adam_", "grad_scale", grad_scales[i]);
    p.grad_amax = static_cast<const float*>(grad_amax.data_ptr()) + i;
    if (fp8s[i].numel() > 0) {
      p.fp8 = view("adam_", "fp8", fp8s[i]);
      p.fp8_t = view("adam_", "fp8_t", fp8_ts[i]);
      p.fp8_scale = scalar("adam_", "fp8_scale", fp8_scales[i]);
    }
    QUAVER_CHECK(steps[i].numel() == 1 && steps[i].scalar_type() == ScalarType::Long,
                 "adam_: step must be one int64");
    p.step = static_cast<int64_t*>(steps[i].data_ptr());
    p.hyper = static_cast<const double*>(hyper.data_ptr()) + 5 * i;
  }
  auto* skips = static_cast<int64_t*>(skipped.data_ptr());
  on_device(
      "adam_", weights[0], [&] { cpu::adam(parameters.data(), count, skips); },
      [&](auto stream) {
        Tensor memory = workspace(weights[0], cuda::adam_workspace_bytes(count));
        cuda::adam(parameters.data(), count, skips, memory.data_ptr(), stream);
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) { m.impl("adam_", TORCH_BOX(&adam_)); }
#if defined(QUAVER_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(quaver, CUDA, m) { m.impl("adam_", TORCH_BOX(&adam_)); }
#endif

}  // namespace quaver::binding
