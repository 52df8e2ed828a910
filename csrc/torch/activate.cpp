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

// What both ops of the forward take beside their casts: checked and dense, with the results that
// do not depend on how the output is cast.
struct Forward {
  Activation kind;
  Tensor x;
  OptionalTensor up, channel_scale;
  GroupedResult x_saved, up_saved;
  Tensor channel_amax;
  const float* scales = nullptr;
  float* amaxes = nullptr;
  RowsView x_view = {}, up_view = {};
};

// A matrix whose rows may lie apart, each of neighbours: what `rows_view` takes.
Tensor with_rows(const Tensor& t) {
  const bool rows = t.size(1) <= 1 || t.stride(1) == 1;
  return rows && t.stride(0) >= t.size(1) && is_aligned(t) ? t : dense(t);
}

RowsView rows_view(const char* op, const char* name, const Tensor& t) {
  static char nothing[16];
  RowsView v;
  v.data = t.data_ptr() == nullptr ? nothing : t.data_ptr();
  v.dtype = dtype_of(op, name, t.scalar_type());
  v.rows = t.size(0);
  v.cols = t.size(1);
  v.pitch = t.stride(0);
  return v;
}

Forward forward_of(const char* op, const Tensor& x, const OptionalTensor& up, const Word& kind,
                   const OptionalTensor& channel_scale, int64_t block) {
  const Activation f = kind_of(op, kind.text);
  check_matrix(op, "x", x);
  if (up.has_value()) check_matrix(op, "up", *up);
  check_device(op, x, "up", up);
  check_device(op, x, "channel_scale", channel_scale);
  const int64_t rows = x.size(0), cols = x.size(1);
  GroupedResult up_saved =
      up.has_value() ? grouped_result(op, x, rows, cols, block) : no_grouped_result(x);
  Forward p = {f,
               with_rows(x),
               up.has_value() ? OptionalTensor(with_rows(*up)) : up,
               dense(channel_scale),
               grouped_result(op, x, rows, cols, block),
               up_saved,
               empty(x, {channel_scale.has_value() ? cols : 0}, ScalarType::Float)};
  p.scales = floats(op, "channel_scale", p.channel_scale, cols);
  p.amaxes = static_cast<float*>(p.channel_amax.data_ptr());
  p.x_view = rows_view(op, "x", p.x);
  if (p.up.has_value()) p.up_view = rows_view(op, "up", *p.up);
  return p;
}

// The same of both ops of the backward.
struct Backward {
  Activation kind;
  Tensor dy, xq, xscale;
  OptionalTensor uq, uscale, channel_scale;
  GroupedView x = {}, up = {};
  const float* scales = nullptr;
  TensorView dy_view = {};

  bool gated() const { return uq.has_value(); }
};

Backward backward_of(const char* op, const Tensor& dy, const Tensor& xq, const Tensor& xscale,
                     const OptionalTensor& uq, const OptionalTensor& uscale, const Word& kind,
                     const OptionalTensor& channel_scale, int64_t block) {
  const Activation f = kind_of(op, kind.text);
  check_matrix(op, "dy", dy);
  QUAVER_CHECK(uq.has_value() == uscale.has_value(), op,
               ": uq and uscale go together, got one of them");
  check_device(op, dy, "xq", xq);
  check_device(op, dy, "xscale", xscale);
  check_device(op, dy, "uq", uq);
  check_device(op, dy, "uscale", uscale);
  check_device(op, dy, "channel_scale", channel_scale);
  Backward p = {f,         dense(dy),     dense(xq),           dense(xscale),
                dense(uq), dense(uscale), dense(channel_scale)};
  p.x = grouped_view(op, "xq", p.xq, "xscale", p.xscale, block);
  if (p.gated()) p.up = grouped_view(op, "uq", *p.uq, "uscale", *p.uscale, block);
  p.scales = floats(op, "channel_scale", p.channel_scale, dy.size(1));
  p.dy_view = view(op, "dy", p.dy);
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> activate(
    const Tensor& x_in, const OptionalTensor& up_in, const Word& kind_name,
    const OptionalTensor& channel_scale_in, ScalarType dtype, const OptionalTensor& scale,
    const OptionalTensor& history, bool power_of_two, int64_t block, bool spread_nan) {
  const char* op = "activate";
  const Forward p = forward_of(op, x_in, up_in, kind_name, channel_scale_in, block);
  CastResult y =
      cast_result(op, p.x, p.x.size(0), p.x.size(1), dtype, scale, history, power_of_two);
  y.view.source.spread_nan = spread_nan;
  on_device(
      op, p.x,
      [&] {
        cpu::activate(y.view, p.x_saved.view, p.up_saved.view, p.amaxes, p.x_view, p.up_view,
                      p.scales, p.kind);
      },
      [&](auto stream) {
        const CastMemory memory(p.x, p.x.size(0), p.x.size(1));
        y.view.source = memory.with(y.view.source);
        cuda::activate(y.view, p.x_saved.view, p.up_saved.view, p.amaxes, p.x_view, p.up_view,
                       p.scales, p.kind, stream);
      });
  return {y.q,
          y.qt,
          y.scale,
          y.amax,
          p.x_saved.codes,
          p.x_saved.scale,
          p.up_saved.codes,
          p.up_saved.scale,
          p.channel_amax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> activate_backward(
    const Tensor& dy_in, const Tensor& xq_in, const Tensor& xscale_in, const OptionalTensor& uq_in,
    const OptionalTensor& uscale_in, const Word& kind_name, const OptionalTensor& channel_scale_in,
    int64_t block, ScalarType dtype, const OptionalTensor& x_history,
    const OptionalTensor& up_history, bool power_of_two, bool spread_nan, bool joint) {
  const char* op = "activate_backward";
  const Backward p = backward_of(op, dy_in, xq_in, xscale_in, uq_in, uscale_in, kind_name,
                                 channel_scale_in, block);
  const bool two = p.gated() && !joint;
  QUAVER_CHECK(two || !up_history.has_value(), op,
               ": up_history goes with uq, and not with joint gradients");
  QUAVER_CHECK(p.gated() || !joint, op, ": joint gradients go with uq");
  const int64_t rows = p.dy.size(0), cols = p.dy.size(1);
  CastResult dx = cast_result(op, p.dy, rows, joint ? 2 * cols : cols, dtype, std::nullopt,
                              x_history, power_of_two);
  CastResult dup =
      two ? cast_result(op, p.dy, rows, cols, dtype, std::nullopt, up_history, power_of_two)
          : no_cast_result(p.dy, dtype);
  dx.view.source.spread_nan = dup.view.source.spread_nan = spread_nan;
  on_device(
      op, p.dy,
      [&] { cpu::activate_backward(dx.view, dup.view, p.dy_view, p.x, p.up, p.scales, p.kind); },
      [&](auto stream) {
        const CastMemory memory(p.dy), up_memory(p.dy, two);
        dx.view.source = memory.with(dx.view.source);
        dup.view.source = up_memory.with(dup.view.source);
        cuda::activate_backward(dx.view, dup.view, p.dy_view, p.x, p.up, p.scales, p.kind, stream);
      });
  return {dx.q, dx.qt, dx.scale, dx.amax, dup.q, dup.qt, dup.scale, dup.amax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> activate_layouts(
    const Tensor& x_in, const OptionalTensor& up_in, const Word& kind_name,
    const OptionalTensor& channel_scale_in, ScalarType dtype, bool tiles_t, bool power_of_two,
    int64_t block) {
  const char* op = "activate_layouts";
  const Forward p = forward_of(op, x_in, up_in, kind_name, channel_scale_in, block);
  const LayoutsResult y =
      layouts_result(op, p.x, p.x.size(0), p.x.size(1), dtype, tiles_t, power_of_two);
  on_device(
      op, p.x,
      [&] {
        cpu::activate_layouts(y.view, p.x_saved.view, p.up_saved.view, p.amaxes, p.x_view,
                              p.up_view, p.scales, p.kind);
      },
      [&](auto stream) {
        cuda::activate_layouts(y.view, p.x_saved.view, p.up_saved.view, p.amaxes, p.x_view,
                               p.up_view, p.scales, p.kind, stream);
      });
  return {y.q.codes,       y.q.scale,        y.qt.codes,       y.qt.scale,    p.x_saved.codes,
          p.x_saved.scale, p.up_saved.codes, p.up_saved.scale, p.channel_amax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
activate_backward_layouts(const Tensor& dy_in, const Tensor& xq_in, const Tensor& xscale_in,
                          const OptionalTensor& uq_in, const OptionalTensor& uscale_in,
                          const Word& kind_name, const OptionalTensor& channel_scale_in,
                          int64_t block, ScalarType dtype, bool power_of_two) {
  const char* op = "activate_backward_layouts";
  const Backward p = backward_of(op, dy_in, xq_in, xscale_in, uq_in, uscale_in, kind_name,
                                 channel_scale_in, block);
  const int64_t rows = p.dy.size(0), cols = p.dy.size(1);
  const LayoutsResult dx = layouts_result(op, p.dy, rows, cols, dtype, false, power_of_two);
  const LayoutsResult dup =
      layouts_result(op, p.dy, rows, cols, dtype, false, power_of_two, p.gated());
  on_device(
      op, p.dy,
      [&] {
        cpu::activate_backward_layouts(dx.view, dup.view, p.dy_view, p.x, p.up, p.scales, p.kind);
      },
      [&](auto stream) {
        cuda::activate_backward_layouts(dx.view, dup.view, p.dy_view, p.x, p.up, p.scales, p.kind,
                                        stream);
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
