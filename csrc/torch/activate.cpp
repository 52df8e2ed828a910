#include "quaver/activate.h"

#include <tuple>

#include "layouts.h"

namespace quaver::binding {
namespace {

Activation kind_of(const char* op, const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  fail(op, ": kind must be \"silu\", \"gelu\" or \"gelu_tanh\", got \"", name, "\"");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> activate(
    const Tensor& x_in, const OptionalTensor& up_in, const Word& kind_name,
    const OptionalTensor& channel_scale_in, ScalarType dtype, const OptionalTensor& scale,
    const OptionalTensor& history, bool power_of_two, int64_t block, bool spread_nan) {
  const char* op = "activate";
  const Activation kind = kind_of(op, kind_name.text);
  check_matrix(op, "x", x_in);
  if (up_in.has_value()) check_matrix(op, "up", *up_in);
  check_device(op, x_in, "up", up_in);
  check_device(op, x_in, "channel_scale", channel_scale_in);
  const Tensor x = dense(x_in);
  const OptionalTensor up = dense(up_in), channel_scale = dense(channel_scale_in);
  const int64_t rows = x.size(0), cols = x.size(1);
  CastResult y = cast_result(op, x, rows, cols, dtype, scale, history, power_of_two);
  y.view.source.spread_nan = spread_nan;
  GroupedResult x_saved = grouped_result(op, x, rows, cols, block);
  GroupedResult up_saved =
      up.has_value() ? grouped_result(op, x, rows, cols, block) : no_grouped_result(x);
  Tensor channel_amax = empty(x, {channel_scale.has_value() ? cols : 0}, ScalarType::Float);
  const float* scales = floats(op, "channel_scale", channel_scale, cols);
  auto* amaxes = static_cast<float*>(channel_amax.data_ptr());
  const TensorView x_view = view(op, "x", x), up_view = optional_view(op, "up", up);
  on_device(
      op, x,
      [&] {
        cpu::activate(y.view, x_saved.view, up_saved.view, amaxes, x_view, up_view, scales, kind);
      },
      [&](auto stream) {
        const CastMemory memory(x);
        y.view.source = memory.with(y.view.source);
        cuda::activate(y.view, x_saved.view, up_saved.view, amaxes, x_view, up_view, scales, kind,
                       stream);
      });
  return {y.q,           y.qt,           y.scale,        y.amax,      x_saved.codes,
          x_saved.scale, up_saved.codes, up_saved.scale, channel_amax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> activate_backward(
    const Tensor& dy_in, const Tensor& xq_in, const Tensor& xscale_in, const OptionalTensor& uq_in,
    const OptionalTensor& uscale_in, const Word& kind_name, const OptionalTensor& channel_scale_in,
    int64_t block, ScalarType dtype, const OptionalTensor& x_history,
    const OptionalTensor& up_history, bool power_of_two, bool spread_nan) {
  const char* op = "activate_backward";
  const Activation kind = kind_of(op, kind_name.text);
  check_matrix(op, "dy", dy_in);
  QUAVER_CHECK(uq_in.has_value() == uscale_in.has_value(), op,
               ": uq and uscale go together, got one of them");
  QUAVER_CHECK(uq_in.has_value() || !up_history.has_value(), op, ": up_history goes with uq");
  check_device(op, dy_in, "xq", xq_in);
  check_device(op, dy_in, "xscale", xscale_in);
  check_device(op, dy_in, "uq", uq_in);
  check_device(op, dy_in, "uscale", uscale_in);
  check_device(op, dy_in, "channel_scale", channel_scale_in);
  const Tensor dy = dense(dy_in), xq = dense(xq_in), xscale = dense(xscale_in);
  const OptionalTensor uq = dense(uq_in), uscale = dense(uscale_in);
  const OptionalTensor channel_scale = dense(channel_scale_in);
  const int64_t rows = dy.size(0), cols = dy.size(1);
  const bool gated = uq.has_value();
  CastResult dx = cast_result(op, dy, rows, cols, dtype, std::nullopt, x_history, power_of_two);
  CastResult dup =
      gated ? cast_result(op, dy, rows, cols, dtype, std::nullopt, up_history, power_of_two)
            : no_cast_result(dy, dtype);
  dx.view.source.spread_nan = dup.view.source.spread_nan = spread_nan;
  const GroupedView x = grouped_view(op, "xq", xq, "xscale", xscale, block);
  const GroupedView u =
      gated ? grouped_view(op, "uq", *uq, "uscale", *uscale, block) : GroupedView{};
  const float* scales = floats(op, "channel_scale", channel_scale, cols);
  const TensorView dy_view = view(op, "dy", dy);
  on_device(
      op, dy, [&] { cpu::activate_backward(dx.view, dup.view, dy_view, x, u, scales, kind); },
      [&](auto stream) {
        const CastMemory memory(dy), up_memory(dy, gated);
        dx.view.source = memory.with(dx.view.source);
        dup.view.source = up_memory.with(dup.view.source);
        cuda::activate_backward(dx.view, dup.view, dy_view, x, u, scales, kind, stream);
      });
  return {dx.q, dx.qt, dx.scale, dx.amax, dup.q, dup.qt, dup.scale, dup.amax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> activate_layouts(
    const Tensor& x_in, const OptionalTensor& up_in, const Word& kind_name,
    const OptionalTensor& channel_scale_in, ScalarType dtype, bool tiles_t, bool power_of_two,
    int64_t block) {
  const char* op = "activate_layouts";
  const Activation kind = kind_of(op, kind_name.text);
  check_matrix(op, "x", x_in);
  if (up_in.has_value()) check_matrix(op, "up", *up_in);
  check_device(op, x_in, "up", up_in);
  check_device(op, x_in, "channel_scale", channel_scale_in);
  const Tensor x = dense(x_in);
  const OptionalTensor up = dense(up_in), channel_scale = dense(channel_scale_in);
  const int64_t rows = x.size(0), cols = x.size(1);
  const LayoutsResult y = layouts_result(op, x, rows, cols, dtype, tiles_t, power_of_two);
  GroupedResult x_saved = grouped_result(op, x, rows, cols, block);
  GroupedResult up_saved =
      up.has_value() ? grouped_result(op, x, rows, cols, block) : no_grouped_result(x);
  Tensor channel_amax = empty(x, {channel_scale.has_value() ? cols : 0}, ScalarType::Float);
  const float* scales = floats(op, "channel_scale", channel_scale, cols);
  auto* amaxes = static_cast<float*>(channel_amax.data_ptr());
  const TensorView x_view = view(op, "x", x), up_view = optional_view(op, "up", up);
  on_device(
      op, x,
      [&] {
        cpu::activate_layouts(y.view, x_saved.view, up_saved.view, amaxes, x_view, up_view, scales,
                              kind);
      },
      [&](auto stream) {
        cuda::activate_layouts(y.view, x_saved.view, up_saved.view, amaxes, x_view, up_view, scales,
                               kind, stream);
      });
  return {y.q.codes,     y.q.scale,      y.qt.codes,     y.qt.scale,  x_saved.codes,
          x_saved.scale, up_saved.codes, up_saved.scale, channel_amax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
activate_backward_layouts(const Tensor& dy_in, const Tensor& xq_in, const Tensor& xscale_in,
                          const OptionalTensor& uq_in, const OptionalTensor& uscale_in,
                          const Word& kind_name, const OptionalTensor& channel_scale_in,
                          int64_t block, ScalarType dtype, bool power_of_two) {
  const char* op = "activate_backward_layouts";
  const Activation kind = kind_of(op, kind_name.text);
  check_matrix(op, "dy", dy_in);
  QUAVER_CHECK(uq_in.has_value() == uscale_in.has_value(), op,
               ": uq and uscale go together, got one of them");
  check_device(op, dy_in, "xq", xq_in);
  check_device(op, dy_in, "xscale", xscale_in);
  check_device(op, dy_in, "uq", uq_in);
  check_device(op, dy_in, "uscale", uscale_in);
  check_device(op, dy_in, "channel_scale", channel_scale_in);
  const Tensor dy = dense(dy_in), xq = dense(xq_in), xscale = dense(xscale_in);
  const OptionalTensor uq = dense(uq_in), uscale = dense(uscale_in);
  const OptionalTensor channel_scale = dense(channel_scale_in);
  const int64_t rows = dy.size(0), cols = dy.size(1);
  const bool gated = uq.has_value();
  const LayoutsResult dx = layouts_result(op, dy, rows, cols, dtype, false, power_of_two);
  const LayoutsResult dup = layouts_result(op, dy, rows, cols, dtype, false, power_of_two, gated);
  const GroupedView x = grouped_view(op, "xq", xq, "xscale", xscale, block);
  const GroupedView u =
      gated ? grouped_view(op, "uq", *uq, "uscale", *uscale, block) : GroupedView{};
  const float* scales = floats(op, "channel_scale", channel_scale, cols);
  const TensorView dy_view = view(op, "dy", dy);
  on_device(
      op, dy,
      [&] { cpu::activate_backward_layouts(dx.view, dup.view, dy_view, x, u, scales, kind); },
      [&](auto stream) {
        cuda::activate_backward_layouts(dx.view, dup.view, dy_view, x, u, scales, kind, stream);
      });
  return {dx.q.codes,  dx.q.scale,  dx.qt.codes,  dx.qt.scale,
          dup.q.codes, dup.q.scale, dup.qt.codes, dup.qt.scale};
}

template <class Library>
void register_ops(Library& m) {
  m.impl("activate", TORCH_BOX(&activate));
  m.impl("activate_layouts", TORCH_BOX(&activate_layouts));
  m.impl("activate_backward_layouts", TORCH_BOX(&activate_backward_layouts));
  m.impl("activate_backward", TORCH_BOX(&activate_backward));
}

}  // namespace

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
