#include "quaver/quantize.h"

#include <algorithm>
#include <tuple>

#include "results.h"
#include "stages.h"

namespace quaver::binding {
namespace {

Layout layout_of(const char* op, const Word& granularity, int64_t block) {
  if (granularity.text == "tensor") return {Grain::tensor, block};
  if (granularity.text == "row") return {Grain::row, block};
  if (granularity.text == "tile") return {Grain::tile, block};
  QUAVER_CHECK(granularity.text == "block", op,
               ": granularity must be \"tensor\", \"row\", \"block\" or \"tile\", got \"",
               granularity.text, "\"");
  check_block(op, {Grain::block, block});
  return {Grain::block, block};
}

// tensor: []; row: [..., 1]; block: [..., ceil(cols / block)]; tile: [ceil(rows / 128), ceil(cols /
// 128)], of a matrix
Shape scale_shape(const char* op, const Tensor& x, const Layout& layout) {
  if (layout.grain == Grain::tensor) return {};
  Shape shape = shape_of(x);
  if (layout.grain == Grain::tile) {
    check_matrix(op, "a tensor with granularity \"tile\"", x);
    shape[0] = layout.scale_rows(shape[0]);
  }
  if (shape.empty()) shape.push_back(1);
  shape.back() = layout.scales_in_row(shape.back());
  return shape;
}

void encode(const char* op, const Tensor& x, const Tensor& q, const Tensor& scale,
            const Tensor& amax, const QuantizeOptions& o, const ScaleSource& source) {
  const TensorView q_view = view(op, "q", q), x_view = view(op, "x", x);
  const TensorView scales = view(op, "scale", scale), amaxes = view(op, "amax", amax);
  on_device(
      op, x, [&] { cpu::quantize(q_view, scales, amaxes, x_view, o, source); },
      [&](auto stream) {
        const CastMemory memory(x, o.layout.grain == Grain::tensor);
        cuda::quantize(q_view, scales, amaxes, x_view, o, memory.with(source), stream);
      });
}

// q like x, with the scales and amaxes of the layout.
std::tuple<Tensor, Tensor, Tensor> quantized(const char* op, const Tensor& x, ScalarType dtype,
                                             const OptionalTensor& scale_in,
                                             const QuantizeOptions& o, const ScaleSource& source) {
  const Shape shape = scale_shape(op, x, o.layout);
  Tensor q = empty(x, shape_of(x), dtype);
  Tensor scale = scale_tensor(op, x, scale_in, shape);
  Tensor amax = empty(x, shape, ScalarType::Float);
  encode(op, x, q, scale, amax, o, source);
  return {q, scale, amax};
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
  ScaleSource source;
  source.given = scale_in.has_value();
  source.history = history_of("quantize", x_in, history);
  return quantized("quantize", dense(x_in), dtype, scale_in, o, source);
}

Tensor dequantize(const Tensor& q_in, const Tensor& scale, ScalarType dtype,
                  const Word& granularity, int64_t block) {
  const Layout layout = layout_of("dequantize", granularity, block);
  QUAVER_CHECK(scale.scalar_type() == ScalarType::Float, "dequantize: scale must be float32, got ",
               torch::headeronly::toString(scale.scalar_type()));
  const Tensor q = dense(q_in);
  if (layout.grain == Grain::tile) check_matrix("dequantize", "q with granularity \"tile\"", q);
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
  const char* op = "cast_transpose";
  check_matrix(op, "x", x_in);
  const Tensor x = dense(x_in);
  Tensor q = empty(x, {x.size(0), x.size(1)}, dtype);
  Tensor qt = empty(x, {x.size(1), x.size(0)}, dtype);
  Tensor scale = scale_tensor(op, x, scale_in, {});
  Tensor amax = empty(x, {}, ScalarType::Float);
  ScaleSource source;
  source.given = scale_in.has_value();
  source.history = history_of(op, x, history);
  const TensorView q_view = view(op, "dtype", q), qt_view = view(op, "dtype", qt);
  const TensorView scales = view(op, "scale", scale), amaxes = view(op, "amax", amax);
  const TensorView x_view = view(op, "x", x);
  on_device(
      op, x,
      [&] { cpu::cast_transpose(q_view, qt_view, scales, amaxes, x_view, power_of_two, source); },
      [&](auto stream) {
        const CastMemory memory(x);
        cuda::cast_transpose(q_view, qt_view, scales, amaxes, x_view, power_of_two,
                             memory.with(source), stream);
      });
  return {q, qt, scale, amax};
}

// Zeros up to multiples of 16 in both axes.
Tensor padded(const Tensor& x) {
  const int64_t rows = x.size(0), cols = x.size(1);
  const int64_t more_rows = gemm_padded(rows) - rows, more_cols = gemm_padded(cols) - cols;
  if (more_rows == 0 && more_cols == 0) return dense(x);
  const int64_t widths[] = {0, more_cols, 0, more_rows};
  return torch::stable::pad(x, {widths, 4});
}

template <class Library>
void register_ops(Library& m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("cast_transpose", TORCH_BOX(&cast_transpose));
}

}  // namespace

PendingCast prepare_cast(const char* op, const Tensor& x_in, ScalarType dtype, bool both,
                         const OptionalTensor& scale, const OptionalTensor& history) {
  const Tensor x = padded(x_in);
  const int64_t rows = x.size(0), cols = x.size(1);
  check_device(op, x, "scale", scale);
  if (scale.has_value()) scalar(op, "scale", *scale);  // a given scale is read where it is
  PendingCast c = {x,
                   {empty(x, {rows, cols}, dtype),
                    {},
                    scale.has_value() ? *scale : empty(x, {}, ScalarType::Float)},
                   {}};
  if (both) c.to.qt = empty(x, {cols, rows}, dtype);
  c.source.given = scale.has_value();
  c.source.history = history_of(op, x, history);
  c.source.spread_nan = true;
  const TensorView q = view(op, "dtype", c.to.q), values = view(op, "x", x);
  QUAVER_CHECK(is_fp8(q.dtype), op, ": dtype must be e4m3 or e5m2, got ", name_of(q.dtype));
  check_cast(op, q, values);
  QUAVER_CHECK(!c.source.history || !c.source.given, op,
               ": a history and a given scale exclude each other");
  return c;
}

namespace {

MatrixJob job_of(const char* op, const PendingCast& c) {
  MatrixJob job;
  job.to.q = view(op, "dtype", c.to.q);
  if (c.to.qt.has_value()) job.to.qt = view(op, "dtype", *c.to.qt);
  job.to.scale = static_cast<float*>(c.to.scale.data_ptr());
  job.to.source = c.source;
  job.x = view(op, "x", c.x);
  return job;
}

void run_cpu(const MatrixJob& job) {
  float amax;
  const GemmCast& to = job.to;
  const TensorView scale = {to.scale, DType::f32, 1, 1}, amaxes = {&amax, DType::f32, 1, 1};
  if (to.qt.data != nullptr)
    cpu::cast_transpose(to.q, to.qt, scale, amaxes, job.x, true, to.source);
  else
    cpu::quantize(to.q, scale, amaxes, job.x, {}, to.source);
}

}  // namespace

void run_casts(const char* op, std::initializer_list<const PendingCast*> casts) {
  MatrixJob jobs[cuda::kMostJobs];
  const PendingCast* first = nullptr;
  int count = 0;
  for (const PendingCast* c : casts) {
    if (c == nullptr) continue;
    first = first == nullptr ? c : first;
    jobs[count++] = job_of(op, *c);
  }
  if (first == nullptr) return;
  on_device(
      op, first->x, [&] { std::for_each(jobs, jobs + count, run_cpu); },
      [&](auto stream) {
        std::vector<CastMemory> memory;
        for (int i = 0; i < count; ++i) {
          memory.emplace_back(first->x, jobs[i].x.rows, jobs[i].x.cols);
          jobs[i].to.source = memory.back().with(jobs[i].to.source);
        }
        cuda::cast_matrices(jobs, count, stream);
      });
}

MatrixCast quantize_whole(const char* op, const Tensor& x, ScalarType dtype, Tensor* amax) {
  const auto [q, scale, seen] = quantized(op, dense(x), dtype, std::nullopt, {}, {});
  *amax = seen;
  return {q, std::nullopt, scale};
}

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
