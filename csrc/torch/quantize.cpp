#include "quaver/quantize.h"

#include <string>
#include <tuple>

#include "cast.h"

namespace quaver::binding {
namespace {

Granularity granularity_of(const char* op, const std::string& name) {
  if (name == "tensor") return Granularity::tensor;
  if (name == "row") return Granularity::row;
  if (name == "block") return Granularity::block;
  fail(op, ": granularity must be \"tensor\", \"row\" or \"block\", got \"", name, "\"");
}

// tensor: []; row: [..., 1]; block: [..., ceil(cols / block)]
Shape scale_shape(const Tensor& x, const QuantizeOptions& o) {
  if (o.granularity == Granularity::tensor) return {};
  Shape shape = shape_of(x);
  if (shape.empty()) shape.push_back(1);
  shape.back() = o.granularity == Granularity::row ? 1 : (shape.back() + o.block - 1) / o.block;
  return shape;
}

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& x_in, ScalarType dtype,
                                            const OptionalTensor& scale_in,
                                            const OptionalTensor& history,
                                            const std::string& granularity, int64_t block,
                                            bool power_of_two, bool stochastic, int64_t seed) {
  QuantizeOptions o;
  o.granularity = granularity_of("quantize", granularity);
  o.block = block;
  o.power_of_two = power_of_two;
  o.stochastic = stochastic;
  o.seed = static_cast<uint64_t>(seed);
  QUAVER_CHECK(o.granularity != Granularity::block || block > 0,
               "quantize: block must be positive, got ", block);
  const DType type = dtype_of("quantize", "dtype", dtype);
  QUAVER_CHECK(scale_max(type) > 0.0f, "quantize: dtype must be e4m3, e5m2 or f16, got ",
               name_of(type));
  const Tensor x = dense(x_in);
  const Shape shape = scale_shape(x, o);
  Tensor q = empty(x, shape_of(x), dtype);
  Tensor scale = scale_tensor("quantize", x, scale_in, shape);
  Tensor amax = empty(x, shape, ScalarType::Float);
  ScaleSource source;
  source.given = scale_in.has_value();
  source.history = history_of("quantize", history, kHistoryState);
  check_device("quantize", x, "history", history);
  const TensorView q_view = view("quantize", "q", q), x_view = view("quantize", "x", x);
  const TensorView scales = view("quantize", "scale", scale),
                   amaxes = view("quantize", "amax", amax);
  on_device(
      "quantize", x, [&] { cpu::quantize(q_view, scales, amaxes, x_view, o, source); },
      [&](auto stream) { cuda::quantize(q_view, scales, amaxes, x_view, o, source, stream); });
  return {q, scale, amax};
}

Tensor dequantize(const Tensor& q_in, const Tensor& scale, ScalarType dtype,
                  const std::string& granularity, int64_t block) {
  QuantizeOptions o;
  o.granularity = granularity_of("dequantize", granularity);
  o.block = block;
  QUAVER_CHECK(o.granularity != Granularity::block || block > 0,
               "dequantize: block must be positive, got ", block);
  QUAVER_CHECK(scale.scalar_type() == ScalarType::Float, "dequantize: scale must be float32, got ",
               torch::headeronly::toString(scale.scalar_type()));
  const Tensor q = dense(q_in);
  Tensor out = empty(q, shape_of(q), dtype);
  check_device("dequantize", q, "scale", scale);
  const Tensor scales = dense(scale);
  const TensorView out_view = view("dequantize", "dtype", out), q_view = view("dequantize", "q", q);
  const TensorView scale_view = view("dequantize", "scale", scales);
  on_device(
      "dequantize", q, [&] { cpu::dequantize(out_view, q_view, scale_view, o); },
      [&](auto stream) { cuda::dequantize(out_view, q_view, scale_view, o, stream); });
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
  source.history = history_of("cast_transpose", history, kHistoryState);
  const char* op = "cast_transpose";
  check_device(op, x, "history", history);
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

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) { register_ops(m); }
#if defined(QUAVER_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(quaver, CUDA, m) { register_ops(m); }
#endif

}  // namespace quaver::binding
