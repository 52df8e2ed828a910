// gemm on a Hopper GPU is CUTLASS's, where a kernel takes the scales (block_scales), and on other
// GPUs from sm_89 on ours by mma.sync, where the scales are those of tensors or rows. On a CPU it
// is cpu::gemm, where that is faster than torch. Elsewhere the codes are decoded and torch's own
// product does the rest: in bf16 on a CPU that is fast at it (oneDNN, f32 sums), in f32 otherwise.
// Codes are exact in both formats. A scale of a whole tensor multiplies the product; others
// multiply the codes, which bf16 then rounds, unless they are powers of two.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>
#include <cstring>
#include <string>
#include <tuple>

#include "../arguments.h"
#include "device.h"
#include "quaver/cpu.h"
#include "quaver/gemm_choice.h"
#include "quaver/quantize.h"
#include "results.h"
#include "stages.h"

namespace quaver::binding {
namespace {

bool has_blocks(const Product& c) {
  const auto is = [](const Layout& l) { return l.grain == Grain::block || l.grain == Grain::tile; };
  return is(c.layout_a) || is(c.layout_b);
}

// The layout of an operand [rows, K], by the shape of its scales. Shapes that fit two layouts mean
// the same in both.
Layout layout_of(const char* name, const Tensor& codes, const Tensor& scale) {
  const int64_t rows = codes.size(0), blocks = blocks_in_row(codes.size(1), kScaleTile);
  const int64_t tiles = blocks_in_row(rows, kScaleTile);
  const auto is = [&](int64_t r, int64_t c) {
    return scale.dim() == 2 && scale.size(0) == r && scale.size(1) == c;
  };
  QUAVER_CHECK(scale.scalar_type() == ScalarType::Float, "gemm: ", name, " must be float32, got ",
               torch::headeronly::toString(scale.scalar_type()));
  if (scale.numel() == 1) return {};
  if (is(rows, 1) || (scale.dim() < 2 && scale.numel() == rows)) return {Grain::row, kScaleTile};
  if (is(rows, blocks)) return {Grain::block, kScaleTile};
  if (is(tiles, blocks)) return {Grain::tile, kScaleTile};
  std::string got;
  for (int64_t d = 0; d < scale.dim(); ++d)
    got += (d == 0 ? "" : ", ") + std::to_string(scale.size(d));
  fail("gemm: ", name, " must be 1 float32, [", rows, ", 1] for rows, [", rows, ", ", blocks,
       "] for 1 x 128 blocks or [", tiles, ", ", blocks, "] for 128 x 128 tiles, got [", got, "]");
}

// Whether the scales are those of 1 x 128 blocks: shapes that fit two layouts mean the same in
// both.
bool fits_blocks(const Tensor& codes, const Tensor& scale) {
  return scale.numel() == codes.size(0) * blocks_in_row(codes.size(1), kScaleTile);
}

bool fits_tiles(const Tensor& codes, const Tensor& scale, const Layout& layout) {
  const int64_t tiles = Layout{Grain::tile}.scale_count(view("gemm", "codes", codes));
  return layout.grain == Grain::tile || (scale.numel() == 1 && tiles == 1);
}

void check(const Product& c) {
  QUAVER_CHECK(c.a.dim() == 2 && c.b.dim() == 2, "gemm: a and b must be matrices, got ", c.a.dim(),
               " and ", c.b.dim(), " dimensions");
  QUAVER_CHECK(c.out.dim() == 2, "gemm: out must be a matrix, got ", c.out.dim(), " dimensions");
  check_device("gemm", c.a, "scale_a", c.scale_a);
  check_device("gemm", c.a, "scale_b", c.scale_b);
  check_device("gemm", c.a, "b", c.b);
  check_device("gemm", c.a, "out", c.out);
  check_device("gemm", c.a, "bias", c.bias);
  check_device("gemm", c.a, "out_scale", c.out_scale);
  if (c.bias.has_value())
    QUAVER_CHECK(c.bias->dim() == 1 && c.bias->size(0) == c.b.size(0), "gemm: bias must have ",
                 c.b.size(0), " values, got ", c.bias->numel());
}

// The kernels that take scales of blocks: both operands e4m3, 1 x 128 blocks of a by 128 x 128
// tiles or 1 x 128 blocks of b, and a result that is not FP8. Other pairs of scales are decoded.
GemmScales block_scales(const Product& c) {
  const bool served = c.a.scalar_type() == ScalarType::Float8_e4m3fn &&
                      c.b.scalar_type() == ScalarType::Float8_e4m3fn && !c.out_scale.has_value();
  if (!has_blocks(c) || !served || !fits_blocks(c.a, c.scale_a)) return GemmScales::outer;
  if (fits_tiles(c.b, c.scale_b, c.layout_b)) return GemmScales::tiles;
  return fits_blocks(c.b, c.scale_b) ? GemmScales::blocks : GemmScales::outer;
}

// The tensors of `c` as the core takes them, except the bias, which may have any format.
GemmArguments arguments_of(const Product& c) {
  GemmArguments g;
  g.out = view("gemm", "out", c.out);
  g.a = view("gemm", "a", c.a);
  g.b = view("gemm", "b", c.b);
  g.scale_a = present("gemm", "scale_a", c.scale_a).as<const float>();
  g.scale_b = present("gemm", "scale_b", c.scale_b).as<const float>();
  g.rows_a = c.layout_a.grain == Grain::row;
  g.rows_b = c.layout_b.grain == Grain::row;
  g.scales = block_scales(c);
  if (c.out_scale.has_value()) g.out_scale = scalar("gemm_quantize", "out_scale", *c.out_scale);
  if (c.amax.has_value()) g.amax = scalar("gemm_quantize", "amax", *c.amax);
  g.accumulate = c.accumulate;
  g.fast_accumulate = c.fast_accumulate;
  return g;
}

Tensor decode_operand(const Tensor& q, const Tensor& scale, const Layout& layout, ScalarType type) {
  Tensor out = empty(q, shape_of(q), type);
  const TensorView to = view("gemm", "operand", out), from = view("gemm", "operand", q);
  const TensorView scales = view("gemm", "scale", scale);
  on_device(
      "gemm", q, [&] { cpu::dequantize(to, from, scales, layout); },
      [&](auto stream) { cuda::dequantize(to, from, scales, layout, stream); });
  return out;
}

// The codes' own values: those under a scale of 1.
Tensor decode_codes(const Tensor& q, ScalarType type) {
  Tensor out = empty(q, shape_of(q), type);
  const TensorView to = view("gemm", "operand", out), from = view("gemm", "operand", q);
  on_device(
      "gemm", q,
      [&] {
        static float one = 1.0f;
        cpu::dequantize(to, from, {&one, DType::f32, 1, 1}, {});
      },
      [&](auto stream) {
        Tensor one = empty(q, {}, ScalarType::Float);
        torch::stable::fill_(one, 1.0);
        cuda::dequantize(to, from, view("gemm", "scale", one), {}, stream);
      });
  return out;
}

// The transpose of a matrix, as a view. Not by torch's op, which goes through the dispatcher.
Tensor transposed(const Tensor& x) {
  const int64_t sizes[] = {x.size(1), x.size(0)}, strides[] = {x.stride(1), x.stride(0)};
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(x.get(), 2, sizes, strides, x.storage_offset(), &view));
  return Tensor(view);
}

// out = alpha * a @ b.T + beta * addend, one rounding to out's type.
void addmm(Tensor& out, const Tensor& addend, const Tensor& a, const Tensor& b, double beta,
           double alpha) {
  const Tensor bt = transposed(b);
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), addend.get(), a.get(), bt.get(), beta, alpha));
}

// a @ b.T in the dtype of both. Into `out`, because autocast would make a bf16 product of any other
// form.
Tensor product(const Tensor& a, const Tensor& b) {
  Tensor out = empty(a, {a.size(0), b.size(0)}, a.scalar_type());
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a),
                                    torch::stable::detail::from(torch::stable::transpose(b, 0, 1)),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The stable ABI has no add; subtracting with alpha = -1 is the same.
Tensor add(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }

// Writes the f32 product: bias and addend in f32 and in the order of the kernels' epilogue, then
// one rounding.
void finish(Product& c, Tensor y) {
  if (c.bias.has_value()) y = add(y, torch::stable::to(*c.bias, ScalarType::Float));
  if (c.accumulate) y = add(y, torch::stable::to(c.out, ScalarType::Float));
  if (!c.out_scale.has_value()) {
    torch::stable::copy_(c.out, y);
    return;
  }
  const TensorView q = view("gemm", "out", c.out), x = view("gemm", "product", y);
  const TensorView scale = view("gemm", "out_scale", *c.out_scale);
  const TensorView amax = view("gemm", "amax", *c.amax);
  ScaleSource given;
  given.given = true;
  on_device(
      "gemm", c.a, [&] { cpu::quantize(q, scale, amax, x, {}, given); },
      [&](auto stream) {
        const CastMemory memory(y);
        cuda::quantize(q, scale, amax, x, {}, memory.with(given), stream);
      });
}

// The product on any device: torch multiplies the codes in f32, then the scales follow. Codes are
// exact in TF32 and bf16 too, which torch may use.
void compose(Product& c) {
  const Tensor a = decode_codes(c.a, ScalarType::Float);
  const Tensor b = decode_codes(c.b, ScalarType::Float);
  // The scales first: each may be near a limit of f32 where their product is not.
  finish(c, multiply(product(a, b), multiply(torch::stable::reshape(c.scale_a, {-1, 1}),
                                             torch::stable::reshape(c.scale_b, {1, -1}))));
}

// The same of operands that are decoded with their scales, in f32.
void compose_decoded(Product& c) {
  finish(c, product(decode_operand(c.a, c.scale_a, c.layout_a, ScalarType::Float),
                    decode_operand(c.b, c.scale_b, c.layout_b, ScalarType::Float)));
}

// Without AVX-512 oneDNN takes bf16 apart value by value: 512^3 takes 46 times as long as in f32.
bool has_bf16_products() {
  int count = 0;
  return std::strcmp(cpu::available_isas(&count)[0], "avx512") == 0;
}

// The product by the CPU's own loops, which write f32 or bf16; other formats are made of f32.
void multiply_codes(Product& c) {
  const ScalarType type = c.out.scalar_type();
  GemmArguments g = arguments_of(c);
  if (type == ScalarType::Float || type == ScalarType::BFloat16) {
    OptionalTensor bias;
    if (c.bias.has_value()) {
      bias = dense(torch::stable::to(*c.bias, ScalarType::Float));
      g.bias = static_cast<const float*>(bias->data_ptr());
    }
    return cpu::gemm(g, c.layout_a, c.layout_b);
  }
  const Tensor y = empty(c.a, shape_of(c.out), ScalarType::Float);
  g.out = view("gemm", "product", y);
  g.out_scale = g.amax = nullptr;
  g.accumulate = false;
  cpu::gemm(g, c.layout_a, c.layout_b);
  finish(c, y);
}

void run_cpu(Product& c) {
  if (cpu::has_gemm()) return multiply_codes(c);
  const ScalarType type = c.out.scalar_type();
  static const bool bf16_products = has_bf16_products();
  const bool direct = type == ScalarType::Float || (type == ScalarType::BFloat16 && bf16_products);
  if (!direct) return has_blocks(c) ? compose_decoded(c) : compose(c);
  const Tensor addend = c.bias.has_value() ? torch::stable::to(*c.bias, type) : c.out;
  const double beta = c.bias.has_value() || c.accumulate ? 1.0 : 0.0;
  if (c.scale_a.numel() != 1 || c.scale_b.numel() != 1)
    return addmm(c.out, addend, decode_operand(c.a, c.scale_a, c.layout_a, type),
                 decode_operand(c.b, c.scale_b, c.layout_b, type), beta, 1.0);
  // The scales are multiplied in f32, whose overflow is infinity; torch refuses a double beyond
  // f32. BLAS ignores an alpha that is NaN, and operands where alpha is 0, NaN and infinity
  // included.
  const float alpha = *scalar("gemm", "scale_a", c.scale_a) * *scalar("gemm", "scale_b", c.scale_b);
  if (!is_finite(alpha) || alpha == 0.0f) return compose(c);
  addmm(c.out, addend, decode_codes(c.a, type), decode_codes(c.b, type), beta, alpha);
}

// Blocks on a GPU without a kernel for them: a bf16 result is the library's product of operands
// that are decoded to bf16; bias and addend, which are added before the one rounding, need it in
// f32.
void run_blocks(Product& c) {
  const bool half =
      c.out.scalar_type() == ScalarType::BFloat16 && !c.bias.has_value() && !c.accumulate;
  if (!half) return compose_decoded(c);
  torch::stable::copy_(c.out,
                       product(decode_operand(c.a, c.scale_a, c.layout_a, ScalarType::BFloat16),
                               decode_operand(c.b, c.scale_b, c.layout_b, ScalarType::BFloat16)));
}

template <class Stream>
void run_cuda(Product& c, Stream stream) {
  GemmArguments g = arguments_of(c);
  const bool blocks = has_blocks(c);
  const cuda::GemmDevice device = cuda::gemm_device();
  const GemmProblem problem = gemm_problem(g, device.major);
  const bool scaled = blocks ? g.scales != GemmScales::outer && problem.hopper && problem.aligned
                             : multiplies_fp8(device.major, device.minor);
  if (!scaled || g.out.numel() == 0 || g.a.cols == 0) return blocks ? run_blocks(c) : compose(c);
  OptionalTensor bias;
  if (c.bias.has_value()) {
    bias = dense(torch::stable::to(*c.bias, ScalarType::Float));
    g.bias = static_cast<const float*>(bias->data_ptr());
  }
  const GemmCandidate choice = choose_gemm(problem, sms_of_product(problem, device.sm_count));
  const Tensor memory = workspace(c.a, choice.workspace_bytes);
  GemmLaunch launch = choice.launch;
  launch.workspace = memory.data_ptr();
  launch.workspace_bytes = choice.workspace_bytes;
  launch.stream = stream;
  cuda::gemm(g, choice.index, launch);
}

Tensor gemm(const Tensor& a, const Tensor& scale_a, const Tensor& b, const Tensor& scale_b,
            const OptionalTensor& bias, ScalarType out_dtype, bool fast_accumulate) {
  QUAVER_CHECK(a.dim() == 2 && b.dim() == 2, "gemm: a and b must be matrices, got ", a.dim(),
               " and ", b.dim(), " dimensions");
  Tensor out = empty(a, {a.size(0), b.size(0)}, out_dtype);
  run_product(prepare_product({out, a, scale_a, b, scale_b, bias, false, fast_accumulate}));
  return out;
}

void gemm_(Tensor out, const Tensor& a, const Tensor& scale_a, const Tensor& b,
           const Tensor& scale_b, const OptionalTensor& bias, bool accumulate,
           bool fast_accumulate) {
  run_product(prepare_product({out, a, scale_a, b, scale_b, bias, accumulate, fast_accumulate}));
}

std::tuple<Tensor, Tensor> gemm_quantize(const Tensor& a, const Tensor& scale_a, const Tensor& b,
                                         const Tensor& scale_b, const OptionalTensor& bias,
                                         ScalarType out_dtype, const Tensor& out_scale,
                                         bool fast_accumulate) {
  QUAVER_CHECK(a.dim() == 2 && b.dim() == 2, "gemm: a and b must be matrices, got ", a.dim(),
               " and ", b.dim(), " dimensions");
  QUAVER_CHECK(is_fp8(dtype_of("gemm_quantize", "out_dtype", out_dtype)),
               "gemm_quantize: out_dtype must be e4m3 or e5m2, got ",
               torch::headeronly::toString(out_dtype));
  Tensor out = empty(a, {a.size(0), b.size(0)}, out_dtype);
  Tensor amax = empty(a, {}, ScalarType::Float);
  run_product(prepare_product(
      {out, a, scale_a, b, scale_b, bias, false, fast_accumulate, out_scale, amax}));
  return {out, amax};
}

template <class Library>
void register_ops(Library& m) {
  m.impl("gemm", TORCH_BOX(&gemm));
  m.impl("gemm_", TORCH_BOX(&gemm_));
  m.impl("gemm_quantize", TORCH_BOX(&gemm_quantize));
}

}  // namespace

Tensor multiply(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Product prepare_product(Product c) {
  check(c);
  for (Tensor* t : {&c.a, &c.b, &c.scale_a, &c.scale_b}) *t = dense(*t);
  if (!c.out.is_contiguous()) {
    c.strided = c.out;
    c.out = c.accumulate ? dense(c.out) : empty(c.out, shape_of(c.out), c.out.scalar_type());
  }
  c.layout_a = layout_of("scale_a", c.a, c.scale_a);
  c.layout_b = layout_of("scale_b", c.b, c.scale_b);
  const GemmArguments g = arguments_of(c);
  check_gemm(g);
  QUAVER_CHECK(!(c.accumulate && c.bias.has_value()),
               "gemm: bias and accumulate exclude each other");
  on_device("gemm", c.a, [] {}, [&](auto) { check_gemm_cuda(g); });
  return c;
}

void run_product(Product c) {
  on_device("gemm", c.a, [&] { run_cpu(c); }, [&](auto stream) { run_cuda(c, stream); });
  if (c.strided.has_value()) torch::stable::copy_(*c.strided, c.out);
}

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
