// A linear layer in FP8, forward and backward each one op: the casts, the products and the encoding
// of the weight's gradient, which are other stages' code. Several ops composed in Python took
// longer than small products (python/quaver/nn/product.py).
#include <tuple>

#include "results.h"
#include "stages.h"

namespace quaver::binding {
namespace {

Tensor none(const Tensor& like) { return empty(like, {0}, ScalarType::Float); }

// x [..., C] as a matrix.
Tensor matrix(const Tensor& x) {
  if (x.dim() == 2) return x;
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return torch::stable::reshape(x, {rows, x.size(x.dim() - 1)});
}

// A tensor for the result of a product, and its memory as the matrix that the product writes, whose
// axes are multiples of 16.
struct Result {
  Tensor value, padded;
};

Result result(const char* op, const Tensor& like, const Shape& shape, int64_t rows, int64_t cols,
              ScalarType type) {
  int64_t wanted = 1;
  for (size_t d = 0; d + 1 < shape.size(); ++d) wanted *= shape[d];
  QUAVER_CHECK(gemm_padded(wanted) == rows && gemm_padded(shape.back()) == cols, op,
               ": codes of a result [", wanted, ", ", shape.back(), "] must give [",
               gemm_padded(wanted), ", ", gemm_padded(shape.back()), "], got [", rows, ", ", cols,
               "]");
  Tensor value = empty(like, shape, type);
  if (shape.back() != cols || wanted != rows) return {value, empty(like, {rows, cols}, type)};
  return {value, shape.size() == 2 ? value : torch::stable::view(value, {rows, cols})};
}

// The shape of x with another last axis.
Shape with_last(const Tensor& x, int64_t cols) {
  Shape shape = shape_of(x);
  shape.back() = cols;
  return shape;
}

// The result without its padding.
Tensor trimmed(const Result& r) {
  if (r.padded.numel() == r.value.numel()) return r.value;
  Tensor to = matrix(r.value);
  Tensor padded = r.padded;
  Tensor rows = torch::stable::narrow(padded, 0, 0, to.size(0));
  torch::stable::copy_(to, torch::stable::narrow(rows, 1, 0, to.size(1)));
  return r.value;
}

OptionalTensor padded_bias(const char* op, const OptionalTensor& bias, int64_t n) {
  if (!bias.has_value()) return bias;
  QUAVER_CHECK(bias->dim() == 1 && bias->size(0) == n, op, ": bias must have ", n, " values, got ",
               bias->numel());
  if (gemm_padded(n) == n) return bias;
  const int64_t widths[] = {0, gemm_padded(n) - n};
  return torch::stable::pad(*bias, {widths, 2});
}

// A weight that is to be cast: padding would hide a wrong size.
void check_plain_weight(const char* op, const Tensor& weight, int64_t n, int64_t k,
                        bool input_major) {
  check_matrix(op, "weight", weight);
  const int64_t rows = input_major ? k : n, cols = input_major ? n : k;
  QUAVER_CHECK(weight.size(0) == rows && weight.size(1) == cols, op, ": weight must be [", rows,
               ", ", cols, "], got [", weight.size(0), ", ", weight.size(1), "]");
}

// A cast that was given, or one that is to be run.
struct Operand {
  MatrixCast codes;
  std::optional<PendingCast> pending;
};

Operand operand(PendingCast cast) { return {cast.to, cast}; }

const PendingCast* pending(const Operand& operand) {
  return operand.pending.has_value() ? &*operand.pending : nullptr;
}

// The operand [..., C] in FP8: given codes, or x cast.
Operand operand_of(const char* op, const Tensor& x, const OptionalTensor& codes,
                   const OptionalTensor& codes_t, const OptionalTensor& scale, ScalarType dtype,
                   bool both, const OptionalTensor& history) {
  QUAVER_CHECK(codes.has_value() == scale.has_value(), op,
               ": codes and scale go together, got one of them");
  if (!codes.has_value())
    return operand(prepare_cast(op, matrix(x), dtype, both, std::nullopt, history));
  check_matrix(op, "codes", *codes);
  return {{*codes, codes_t, *scale}, {}};
}

// A product that is to be run.
struct PendingProduct {
  Result out;
  Product product;
};

PendingProduct prepare(const char* op, const Shape& shape, const Tensor& a, const Tensor& scale_a,
                       const Tensor& b, const Tensor& scale_b, const OptionalTensor& bias,
                       ScalarType dtype, bool fast) {
  const Result out = result(op, a, shape, a.size(0), b.size(0), dtype);
  return {out, prepare_product({out.padded, a, scale_a, b, scale_b, bias, false, fast})};
}

Tensor run(const PendingProduct& p) {
  run_product(p.product);
  return trimmed(p.out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear(
    const Tensor& x, const OptionalTensor& codes, const OptionalTensor& scale, const Tensor& weight,
    const OptionalTensor& weight_scale, const OptionalTensor& bias, int64_t n,
    ScalarType input_dtype, ScalarType weight_dtype, ScalarType out_dtype, bool both,
    bool input_major, const OptionalTensor& history) {
  const char* op = "linear";
  QUAVER_CHECK(x.dim() > 0, op, ": x must be [..., K], got no dimensions");
  check_device(op, x, "weight", weight);
  check_device(op, x, "codes", codes);
  const Operand a = operand_of(op, x, codes, std::nullopt, scale, input_dtype, both, history);
  Operand w = {{weight, {}, a.codes.scale}, {}};
  if (weight_scale.has_value()) {
    check_matrix(op, "weight", weight);
    w.codes.scale = *weight_scale;
  } else {
    check_plain_weight(op, weight, n, x.size(x.dim() - 1), input_major);
    w = operand(prepare_cast(op, weight, weight_dtype, input_major, std::nullopt, std::nullopt));
  }
  const Tensor& b = w.pending.has_value() && input_major ? *w.codes.qt : w.codes.q;
  const PendingProduct y = prepare(op, with_last(x, n), a.codes.q, a.codes.scale, b, w.codes.scale,
                                   padded_bias(op, bias, n), out_dtype, true);
  run_casts(op, {pending(a), pending(w)});
  const bool cast = a.pending.has_value();
  return {run(y), cast ? a.codes.q : none(x), a.codes.qt.has_value() ? *a.codes.qt : none(x),
          cast ? a.codes.scale : none(x), w.pending.has_value() ? w.codes.scale : none(x)};
}

struct Gradient {
  Tensor value, scale, amax;
};

// The product, times the channels [K]: plain, or as codes under a scale just in time.
Gradient weight_gradient(const char* op, const PendingProduct& product,
                         const OptionalTensor& channels, bool input_major,
                         const std::optional<ScalarType>& codes) {
  Tensor dw = run(product);
  if (channels.has_value()) {
    const Tensor by = torch::stable::to(*channels, dw.scalar_type());
    dw = multiply(dw, input_major ? torch::stable::reshape(by, {by.size(0), 1}) : by);
  }
  if (!codes.has_value()) return {dw, none(dw), none(dw)};
  Tensor amax = none(dw);
  const MatrixCast cast = quantize_whole(op, dw, *codes, &amax);
  return {cast.q, cast.scale, amax};
}

// The codes [K, N] that the forward's weight had: given, or encoded again under their scale.
Operand transposed_weight(const char* op, const Tensor& weight, const Tensor& scale, int64_t n,
                          int64_t k, ScalarType dtype, bool input_major) {
  if (weight.scalar_type() == dtype) {
    check_matrix(op, "weight", weight);
    return {{weight, {}, scale}, {}};
  }
  check_plain_weight(op, weight, n, k, input_major);
  Operand w = operand(prepare_cast(op, weight, dtype, !input_major, scale, std::nullopt));
  if (!input_major) w.codes.q = *w.codes.qt;
  return w;
}

void check_gradient(const char* op, const OptionalTensor& channels, int64_t cols,
                    const std::optional<ScalarType>& codes) {
  if (codes.has_value())
    QUAVER_CHECK(is_fp8(dtype_of(op, "dw_codes", *codes)), op,
                 ": dw_codes must be e4m3 or e5m2, got ", torch::headeronly::toString(*codes));
  if (!channels.has_value()) return;
  QUAVER_CHECK(channels->dim() == 1 && channels->size(0) == cols, op, ": channels must have ", cols,
               " values, got ", channels->numel());
  check_float(op, "channels", view(op, "channels", dense(*channels)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_backward(
    const Tensor& dy, const OptionalTensor& codes, const OptionalTensor& codes_t,
    const OptionalTensor& scale, const OptionalTensor& weight, const OptionalTensor& weight_scale,
    const OptionalTensor& xt, const OptionalTensor& x_scale, const OptionalTensor& channels,
    int64_t n, int64_t k, ScalarType grad_dtype, ScalarType weight_dtype, ScalarType dx_dtype,
    ScalarType dw_dtype, const std::optional<ScalarType>& dw_codes, bool input_major,
    const OptionalTensor& history) {
  const char* op = "linear_backward";
  const bool needs_x = weight.has_value(), needs_weight = xt.has_value();
  QUAVER_CHECK(dy.dim() > 0, op, ": dy must be [..., N], got no dimensions");
  QUAVER_CHECK(weight_scale.has_value() == needs_x, op,
               ": weight and weight_scale go together, got one of them");
  QUAVER_CHECK(x_scale.has_value() == needs_weight, op,
               ": xt and x_scale go together, got one of them");
  QUAVER_CHECK(!codes.has_value() || codes_t.has_value() || !needs_weight, op,
               ": xt needs codes_t beside codes, got none");
  for (const auto& [name, t] : {std::pair("codes", codes),
                                {"codes_t", codes_t},
                                {"weight", weight},
                                {"xt", xt},
                                {"channels", channels}})
    check_device(op, dy, name, t);
  check_gradient(op, channels, k, dw_codes);
  const Operand g = operand_of(op, dy, codes, codes_t, scale, grad_dtype, needs_weight, history);
  Operand w;
  std::optional<PendingProduct> dx_product, dw_product;
  if (needs_x) {
    w = transposed_weight(op, *weight, *weight_scale, n, k, weight_dtype, input_major);
    dx_product = prepare(op, with_last(dy, k), g.codes.q, g.codes.scale, w.codes.q, *weight_scale,
                         std::nullopt, dx_dtype, false);
  }
  if (needs_weight) {
    check_matrix(op, "codes_t", *g.codes.qt);
    check_matrix(op, "xt", *xt);
    dw_product = input_major ? prepare(op, {k, n}, *xt, *x_scale, *g.codes.qt, g.codes.scale,
                                       std::nullopt, dw_dtype, false)
                             : prepare(op, {n, k}, *g.codes.qt, g.codes.scale, *xt, *x_scale,
                                       std::nullopt, dw_dtype, false);
  }
  run_casts(op, {pending(g), pending(w)});
  const Tensor dx = needs_x ? run(*dx_product) : none(dy);
  if (!needs_weight) return {dx, none(dy), none(dy), none(dy)};
  const Gradient dw = weight_gradient(op, *dw_product, channels, input_major, dw_codes);
  return {dx, dw.value, dw.scale, dw.amax};
}

template <class Library>
void register_ops(Library& m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
