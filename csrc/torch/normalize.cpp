#include "quaver/normalize.h"

#include <tuple>

#include "layouts.h"

namespace quaver::binding {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> normalize(
    const Tensor& x_in, const OptionalTensor& weight_in, const OptionalTensor& bias_in, double eps,
    bool centered, ScalarType dtype, const OptionalTensor& scale, const OptionalTensor& history,
    bool power_of_two, int64_t block, bool spread_nan) {
  const char* op = "normalize";
  check_matrix(op, "x", x_in);
  check_device(op, x_in, "weight", weight_in);
  check_device(op, x_in, "bias", bias_in);
  const Tensor x = dense(x_in);
  const OptionalTensor weight = dense(weight_in), bias = dense(bias_in);
  const int64_t rows = x.size(0), cols = x.size(1);
  CastResult y = cast_result(op, x, rows, cols, dtype, scale, history, power_of_two);
  y.view.source.spread_nan = spread_nan;
  GroupedResult saved = grouped_result(op, x, rows, cols, block);
  Tensor mean = empty(x, {centered ? rows : 0}, ScalarType::Float);
  Tensor rstd = empty(x, {rows}, ScalarType::Float);
  float* mean_data = centered ? floats(op, "mean", mean, rows) : nullptr;
  float* rstd_data = floats(op, "rstd", rstd, rows);
  const TensorView x_view = view(op, "x", x);
  const TensorView weights = optional_view(op, "weight", weight);
  const TensorView biases = optional_view(op, "bias", bias);
  const float epsilon = static_cast<float>(eps);
  on_device(
      op, x,
      [&] {
        cpu::normalize(y.view, saved.view, mean_data, rstd_data, x_view, weights, biases, epsilon);
      },
      [&](auto stream) {
        const CastMemory memory(x);
        y.view.source = memory.with(y.view.source);
        cuda::normalize(y.view, saved.view, mean_data, rstd_data, x_view, weights, biases, epsilon,
                        stream);
      });
  return {y.q, y.qt, y.scale, y.amax, saved.codes, saved.scale, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> normalize_layouts(
    const Tensor& x_in, const OptionalTensor& weight_in, const OptionalTensor& bias_in, double eps,
    bool centered, ScalarType dtype, bool tiles_t, bool power_of_two, int64_t block) {
  const char* op = "normalize_layouts";
  check_matrix(op, "x", x_in);
  check_device(op, x_in, "weight", weight_in);
  check_device(op, x_in, "bias", bias_in);
  const Tensor x = dense(x_in);
  const OptionalTensor weight = dense(weight_in), bias = dense(bias_in);
  const int64_t rows = x.size(0), cols = x.size(1);
  const LayoutsResult y = layouts_result(op, x, rows, cols, dtype, tiles_t, power_of_two);
  GroupedResult saved = grouped_result(op, x, rows, cols, block);
  Tensor mean = empty(x, {centered ? rows : 0}, ScalarType::Float);
  Tensor rstd = empty(x, {rows}, ScalarType::Float);
  float* mean_data = centered ? floats(op, "mean", mean, rows) : nullptr;
  float* rstd_data = floats(op, "rstd", rstd, rows);
  const TensorView x_view = view(op, "x", x);
  const TensorView weights = optional_view(op, "weight", weight);
  const TensorView biases = optional_view(op, "bias", bias);
  const float epsilon = static_cast<float>(eps);
  on_device(
      op, x,
      [&] {
        cpu::normalize_layouts(y.view, saved.view, mean_data, rstd_data, x_view, weights, biases,
                               epsilon);
      },
      [&](auto stream) {
        cuda::normalize_layouts(y.view, saved.view, mean_data, rstd_data, x_view, weights, biases,
                                epsilon, stream);
      });
  return {y.q.codes, y.q.scale, y.qt.codes, y.qt.scale, saved.codes, saved.scale, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> normalize_backward(const Tensor& dy_in, const Tensor& xq_in,
                                                      const Tensor& xscale_in,
                                                      const Tensor& mean_in, const Tensor& rstd_in,
                                                      const OptionalTensor& weight_in,
                                                      int64_t block, bool has_bias,
                                                      ScalarType dx_dtype) {
  const char* op = "normalize_backward";
  check_matrix(op, "dy", dy_in);
  check_device(op, dy_in, "xq", xq_in);
  check_device(op, dy_in, "xscale", xscale_in);
  check_device(op, dy_in, "mean", mean_in);
  check_device(op, dy_in, "rstd", rstd_in);
  check_device(op, dy_in, "weight", weight_in);
  const Tensor dy = dense(dy_in), xq = dense(xq_in), xscale = dense(xscale_in);
  const Tensor mean = dense(mean_in), rstd = dense(rstd_in);
  const OptionalTensor weight = dense(weight_in);
  const int64_t rows = dy.size(0), cols = dy.size(1);
  Tensor dx = empty(dy, {rows, cols}, dx_dtype);
  Tensor dweight = empty(dy, {weight.has_value() ? cols : 0}, ScalarType::Float);
  Tensor dbias = empty(dy, {has_bias ? cols : 0}, ScalarType::Float);
  const GroupedView x = grouped_view(op, "xq", xq, "xscale", xscale, block);
  const float* mean_data = mean.numel() != 0 ? floats(op, "mean", mean, rows) : nullptr;
  const float* rstd_data = floats(op, "rstd", rstd, rows);
  float* dweight_data = weight.has_value() ? floats(op, "dweight", dweight, cols) : nullptr;
  float* dbias_data = has_bias ? floats(op, "dbias", dbias, cols) : nullptr;
  const TensorView dx_view = view(op, "dx_dtype", dx), dy_view = view(op, "dy", dy);
  const TensorView weights = optional_view(op, "weight", weight);
  on_device(
      op, dy,
      [&] {
        cpu::normalize_backward(dx_view, dweight_data, dbias_data, dy_view, x, mean_data, rstd_data,
                                weights);
      },
      [&](auto stream) {
        const Tensor memory = workspace(dy, cuda::normalize_backward_workspace_bytes(rows, cols));
        cuda::normalize_backward(dx_view, dweight_data, dbias_data, dy_view, x, mean_data,
                                 rstd_data, weights, memory.data_ptr(), stream);
      });
  return {dx, dweight, dbias};
}

template <class Library>
void register_ops(Library& m) {
  m.impl("normalize", TORCH_BOX(&normalize));
  m.impl("normalize_layouts", TORCH_BOX(&normalize_layouts));
  m.impl("normalize_backward", TORCH_BOX(&normalize_backward));
}

}  // namespace

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
