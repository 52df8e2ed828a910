#include "quaver/normalize.h"

#include <tuple>

#include "layouts.h"

namespace quaver::binding {
namespace {

// What both ops of the forward take beside their casts: checked and dense, with the results that
// do not depend on how the output is cast.
struct Forward {
  Tensor x;
  OptionalTensor weight, bias;
  GroupedResult saved;
  Tensor mean, rstd;
  float *mean_data = nullptr, *rstd_data = nullptr;
  TensorView x_view = {}, weights = {}, biases = {};
};

Forward forward_of(const char* op, const Tensor& x, const OptionalTensor& weight,
                   const OptionalTensor& bias, bool centered, int64_t block) {
  check_matrix(op, "x", x);
  check_device(op, x, "weight", weight);
  check_device(op, x, "bias", bias);
  const int64_t rows = x.size(0);
  Forward p = {dense(x),
               dense(weight),
               dense(bias),
               grouped_result(op, x, rows, x.size(1), block),
               empty(x, {centered ? rows : 0}, ScalarType::Float),
               empty(x, {rows}, ScalarType::Float)};
  p.mean_data = centered ? floats(op, "mean", p.mean, rows) : nullptr;
  p.rstd_data = floats(op, "rstd", p.rstd, rows);
  p.x_view = view(op, "x", p.x);
  p.weights = optional_view(op, "weight", p.weight);
  p.biases = optional_view(op, "bias", p.bias);
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> normalize(
    const Tensor& x_in, const OptionalTensor& weight_in, const OptionalTensor& bias_in, double eps,
    bool centered, ScalarType dtype, const OptionalTensor& scale, const OptionalTensor& history,
    bool power_of_two, int64_t block, bool spread_nan) {
  const char* op = "normalize";
  const Forward p = forward_of(op, x_in, weight_in, bias_in, centered, block);
  CastResult y =
      cast_result(op, p.x, p.x.size(0), p.x.size(1), dtype, scale, history, power_of_two);
  y.view.source.spread_nan = spread_nan;
  const float epsilon = static_cast<float>(eps);
  on_device(
      op, p.x,
      [&] {
        cpu::normalize(y.view, p.saved.view, p.mean_data, p.rstd_data, p.x_view, p.weights,
                       p.biases, epsilon);
      },
      [&](auto stream) {
        const CastMemory memory(p.x);
        y.view.source = memory.with(y.view.source);
        cuda::normalize(y.view, p.saved.view, p.mean_data, p.rstd_data, p.x_view, p.weights,
                        p.biases, epsilon, stream);
      });
  return {y.q, y.qt, y.scale, y.amax, p.saved.codes, p.saved.scale, p.mean, p.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> normalize_layouts(
    const Tensor& x_in, const OptionalTensor& weight_in, const OptionalTensor& bias_in, double eps,
    bool centered, ScalarType dtype, bool tiles_t, bool power_of_two, int64_t block) {
  const char* op = "normalize_layouts";
  const Forward p = forward_of(op, x_in, weight_in, bias_in, centered, block);
  const LayoutsResult y =
      layouts_result(op, p.x, p.x.size(0), p.x.size(1), dtype, tiles_t, power_of_two);
  const float epsilon = static_cast<float>(eps);
  on_device(
      op, p.x,
      [&] {
        cpu::normalize_layouts(y.view, p.saved.view, p.mean_data, p.rstd_data, p.x_view, p.weights,
                               p.biases, epsilon);
      },
      [&](auto stream) {
        cuda::normalize_layouts(y.view, p.saved.view, p.mean_data, p.rstd_data, p.x_view, p.weights,
                                p.biases, epsilon, stream);
      });
  return {y.q.codes,     y.q.scale,     y.qt.codes, y.qt.scale,
          p.saved.codes, p.saved.scale, p.mean,     p.rstd};
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
