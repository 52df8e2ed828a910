// gemm on the CPU: e4m3 and e5m2 are exact in bf16, so the codes are decoded and torch's own
// product (oneDNN, with f32 accumulation) does the rest.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "bridge.h"
#include "quaver/quantize.h"

namespace quaver::binding {
namespace {

struct Problem {
  int64_t m, n, k;
  bool tensor_scales;  // one scale for each operand; otherwise one for each row of a or b
};

Problem check(const Tensor& a, const Tensor& scale_a, const Tensor& b, const Tensor& scale_b,
              const OptionalTensor& bias) {
  QUAVER_CHECK(a.dim() == 2 && b.dim() == 2, "gemm: a and b must be matrices, got ", a.dim(),
               " and ", b.dim(), " dimensions");
  const DType type_a = dtype_of("gemm", "a", a.scalar_type());
  const DType type_b = dtype_of("gemm", "b", b.scalar_type());
  QUAVER_CHECK(is_fp8(type_a) && is_fp8(type_b), "gemm: a and b must be e4m3 or e5m2, got ",
               name_of(type_a), " and ", name_of(type_b));
  const int64_t m = a.size(0), n = b.size(0), k = a.size(1);
  QUAVER_CHECK(b.size(1) == k, "gemm: a [M, K] and b [N, K] must share K, got [", m, ", ", k,
               "] and [", n, ", ", b.size(1), "]");
  for (const auto& [scale, rows, name] :
       {std::make_tuple(&scale_a, m, "scale_a"), std::make_tuple(&scale_b, n, "scale_b")})
    QUAVER_CHECK((scale->numel() == 1 || scale->numel() == rows) &&
                     scale->scalar_type() == ScalarType::Float,
                 "gemm: ", name, " must be 1 or ", rows, " float32, got ", scale->numel(), " of ",
                 torch::headeronly::toString(scale->scalar_type()));
  if (bias.has_value())
    QUAVER_CHECK(bias->dim() == 1 && bias->size(0) == n, "gemm: bias must have ", n,
                 " values, got ", bias->numel());
  return {m, n, k, scale_a.numel() == 1 && scale_b.numel() == 1};
}

Tensor decode_codes(const Tensor& q, ScalarType type) {
  static const float one = 1.0f;
  const Tensor codes = dense(q);
  Tensor out = empty(q, shape_of(q), type);
  TensorView scale;
  scale.data = const_cast<float*>(&one);
  scale.rows = scale.cols = 1;
  cpu::dequantize(view("gemm", "operand", out), view("gemm", "operand", codes), scale, {});
  return out;
}

Tensor decode_rows(const Tensor& q, const Tensor& scale) {
  QuantizeOptions layout;
  if (scale.numel() != 1) layout.granularity = Granularity::row;
  const Tensor codes = dense(q);
  Tensor out = empty(q, shape_of(q), ScalarType::Float);
  cpu::dequantize(view("gemm", "operand", out), view("gemm", "operand", codes),
                  view("gemm", "scale", dense(scale)), layout);
  return out;
}

// out = alpha * a @ b.T + beta * addend, one rounding to out's type.
void addmm(Tensor& out, const Tensor& addend, const Tensor& a, const Tensor& b, double beta,
           double alpha) {
  const Tensor bt = torch::stable::transpose(b, 0, 1);
  if (aoti_torch_cpu_addmm_out(out.get(), addend.get(), a.get(), bt.get(), beta, alpha) != 0)
    fail("gemm: torch's matrix product failed");
}

void run(Tensor& out, const Tensor& a, const Tensor& scale_a, const Tensor& b,
         const Tensor& scale_b, const OptionalTensor& bias, bool accumulate) {
  const Problem p = check(a, scale_a, b, scale_b, bias);
  QUAVER_CHECK(out.dim() == 2 && out.size(0) == p.m && out.size(1) == p.n, "gemm: out must be [",
               p.m, ", ", p.n, "]");
  QUAVER_CHECK(!(accumulate && bias.has_value()), "gemm: bias and accumulate exclude each other");
  const ScalarType type = out.scalar_type();
  QUAVER_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
               "gemm: out must be float32 or bfloat16 on the CPU, got ",
               torch::headeronly::toString(type));
  // In f32: a product that overflows is infinite, where torch would refuse a double beyond f32. MKL
  // ignores an alpha that is NaN, so one that is not finite goes into the operands.
  float alpha = 1.0f;
  if (p.tensor_scales)
    alpha = *scalar("gemm", "scale_a", scale_a) * *scalar("gemm", "scale_b", scale_b);
  const bool codes = p.tensor_scales && is_finite(alpha);
  if (!codes) alpha = 1.0f;
  const bool half = type == ScalarType::BFloat16 && codes;
  Tensor decoded_a, decoded_b;
  if (codes) {
    const ScalarType decoded = half ? ScalarType::BFloat16 : ScalarType::Float;
    decoded_a = decode_codes(a, decoded);
    decoded_b = decode_codes(b, decoded);
  } else {
    decoded_a = decode_rows(a, scale_a);
    decoded_b = decode_rows(b, scale_b);
  }
  Tensor addend = bias.has_value() ? torch::stable::to(*bias, type) : out;
  const double beta = bias.has_value() || accumulate ? 1.0 : 0.0;
  if (!codes && type == ScalarType::BFloat16) {  // f32 product, rounded at the end
    Tensor wide = empty(out, shape_of(out), ScalarType::Float);
    addmm(wide, beta != 0.0 ? torch::stable::to(addend, ScalarType::Float) : wide, decoded_a,
          decoded_b, beta, alpha);
    torch::stable::copy_(out, wide);
    return;
  }
  addmm(out, addend, decoded_a, decoded_b, beta, alpha);
}

Tensor gemm_cpu(const Tensor& a, const Tensor& scale_a, const Tensor& b, const Tensor& scale_b,
                const OptionalTensor& bias, ScalarType out_dtype, bool) {
  const Problem p = check(a, scale_a, b, scale_b, bias);
  Tensor out = empty(a, {p.m, p.n}, out_dtype);
  run(out, a, scale_a, b, scale_b, bias, false);
  return out;
}

void gemm_cpu_(Tensor out, const Tensor& a, const Tensor& scale_a, const Tensor& b,
               const Tensor& scale_b, const OptionalTensor& bias, bool accumulate, bool) {
  run(out, a, scale_a, b, scale_b, bias, accumulate);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) {
  m.impl("gemm", TORCH_BOX(&gemm_cpu));
  m.impl("gemm_", TORCH_BOX(&gemm_cpu_));
}

}  // namespace quaver::binding
