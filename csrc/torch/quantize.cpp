#include "quaver/quantize.h"

#include <tuple>

#include "results.h"

namespace quaver::binding {
namespace {

Layout layout_of(const char* op, const Word& granularity, int64_t block) {
  if (granularity.text == "tensor") return {Grain::tensor, block};
  if (granularity.text == "row") return {Grain::row, block};
  QUAVER_CHECK(granularity.text == "block", op,
               ": granularity must be \"tensor\", \"row\" or \"block\", got \"", granularity.text,
               "\"");
  check_block(op, {Grain::block, block});
  return {Grain::block, block};
}

// tensor: []; row: [..., 1]; block: [..., ceil(cols / block)]
Shape scale_shape(const Tensor& x, const Layout& layout) {
  if (layout.grain == Grain::tensor) return {};
  Shape shape = shape_of(x);
  if (shape.empty()) shape.push_back(1);
  shape.back() = layout.scales_in_row(shape.back());
  return shape;
}

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& x_in, ScalarType dtype,
                                            const OptionalTensor& scale_in,
                                            const OptionalTensor& history, const Word& granularity,
                                            int64_t block, bool power_of_two, bool stochastic,
                                            int64_t seed) {
  QuantizeOptions o;
  o.layout = layout_of("quantize", granularity, block);
  o.power_of_two = power_of_two;
  o.stochastic = stochastic;
  o.seed = static_cast<uint64_t>(seed);
  const DType type = dtype_of("quantize", "dtype", dtype);
  QUAVER_CHECK(scale_max(type) > 0.0f, "quantize: dtype must be e4m3, e5m2 or f16, got ",
               name_of(type));
  const Tensor x = dense(x_in);
  const Shape shape = scale_shape(x, o.layout);
  Tensor q = empty(x, shape_of(x), dtype);
  Tensor scale = scale_tensor("quantize", x, scale_in, shape);
  Tensor amax = empty(x, shape, ScalarType::Float);
  ScaleSource source;
  source.given = scale_in.has_value();
  source.history = history_of("quantize", x, history);
  const TensorView q_view = view("quantize", "q", q), x_view = view("quantize", "x", x);
  const TensorView scales = view("quantize", "scale", scale),
                   amaxes = view("quantize", "amax", amax);
  on_device(
      "quantize", x, [&] { cpu::quantize(q_view, scales, amaxes, x_view, o, source); },
      [&](auto stream) { cuda::quantize(q_view, scales, amaxes, x_view, o, source, stream); });
  return {q, scale, amax};
}

Tensor dequantize(const Tensor& q_in, const Tensor& scale, ScalarType dtype,
                  const Word& granularity, int64_t block) {
  const Layout layout = layout_of("dequantize", granularity, block);
  QUAVER_CHECK(scale.scalar_type() == ScalarType::Float, "dequantize: scale must be float32, got ",
               torch::headeronly::toString(scale.scalar_type()));
  const Tensor q = dense(q_in);
  Tensor out = empty(q, shape_of(q), dtype);
  check_device("dequantize", q, "scale", scale);
  const Tensor scales = dense(scale);
  const TensorView out_view = view("dequantize", "dtype", out), q_view = view("dequantize", "q", q);
  const TensorView scale_view = view("dequantize", "scale", scales);
  on_device(
      "dequantize", q, [&] { cpu::dequantize(out_view, q_view, scale_view, layout); },
      [&](auto stream) { cuda::dequantize(out_view, q_view, scale_view, layout, stream); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cast_transpose(const Tensor& x_in, ScalarType dtype,
                                                          const OptionalTensor& scale_in,
                                                          const OptionalTensor& history,
                                                          bool power_of_two) {
  QUAVER_CHECK(x_in.dim() == 2, "cast_transpose: x must be a matrix, got ", x_in.dim(),
               " dimensions");
  const Tensor x = dense(x_in);
  Tensor q = empty(x, {x.size(0), x.size(1)}, dtype);
  Tensor qt = empty(x, {x.size(1), x.size(0)}, dtype);
  Tensor scale = scale_tensor("cast_transpose", x, scale_in, {});
  Tensor amax = empty(x, {}, ScalarType::Float);
  ScaleSource source;
  source.given = scale_in.has_value();
  const char* op = "cast_transpose";
  source.history = history_of(op, x, history);
  const TensorView q_view = view(op, "dtype", q), qt_view = view(op, "dtype", qt);
  const TensorView scales = view(op, "scale", scale), amaxes = view(op, "amax", amax);
  const TensorView x_view = view(op, "x", x);
  on_device(
      op, x,
      [&] { cpu::cast_transpose(q_view, qt_view, scales, amaxes, x_view, power_of_two, source); },
      [&](auto stream) {
        cuda::cast_transpose(q_view, qt_view, scales, amaxes, x_view, power_of_two, source, stream);
      });
  return {q, qt, scale, amax};
}

template <class Library>
void register_ops(Library& m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("cast_transpose", TORCH_BOX(&cast_transpose));
}

}  // namespace

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
