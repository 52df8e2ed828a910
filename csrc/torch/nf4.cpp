#include "quaver/nf4.h"

#include <tuple>

#include "../check_nf4.h"
#include "device.h"

namespace quaver::binding {
namespace {

Nf4View view_of(const char* op, const Tensor& codes, const Tensor& absmax, int64_t numel,
                int64_t block) {
  check_nf4_block(op, block);
  QUAVER_CHECK(numel >= 0 && numel <= INT64_MAX - kNf4MaxBlock, op,
               ": numel must be in [0, 2^63 - ", kNf4MaxBlock, "), got ", numel);
  const int64_t bytes = numel / 2 + numel % 2;
  QUAVER_CHECK(codes.numel() == bytes && codes.scalar_type() == ScalarType::Byte, op,
               ": codes must be ", bytes, " uint8 for ", numel, " elements, got ", codes.numel(),
               " of ", torch::headeronly::toString(codes.scalar_type()));
  Nf4View v;
  v.absmax = floats(op, "absmax", absmax, nf4_block_count(numel, block));
  static uint8_t nothing[1];
  v.codes = numel == 0 ? nothing : static_cast<uint8_t*>(codes.data_ptr());
  v.numel = numel;
  v.block = block;
  return v;
}

std::tuple<Tensor, Tensor> nf4_encode(const Tensor& x_in, int64_t block) {
  const char* op = "nf4_encode";
  check_nf4_block(op, block);
  const Tensor x = dense(x_in);
  const int64_t n = x.numel();
  const TensorView values = view(op, "x", x);
  Tensor codes = empty(x, {n / 2 + n % 2}, ScalarType::Byte);
  Tensor absmax = empty(x, {nf4_block_count(n, block)}, ScalarType::Float);
  const Nf4View out = view_of(op, codes, absmax, n, block);
  on_device(
      op, x, [&] { cpu::nf4_encode(out, values); },
      [&](auto stream) { cuda::nf4_encode(out, values, stream); });
  return {codes, absmax};
}

Tensor nf4_decode(const Tensor& codes_in, const Tensor& absmax_in, int64_t numel, ScalarType dtype,
                  int64_t block) {
  const char* op = "nf4_decode";
  const Tensor codes = dense(codes_in), absmax = dense(absmax_in);
  check_device(op, codes, "absmax", absmax);
  const Nf4View x = view_of(op, codes, absmax, numel, block);
  const DType type = dtype_of(op, "dtype", dtype);
  QUAVER_CHECK(!is_fp8(type), op, ": dtype must be float32, float16 or bfloat16, got ",
               torch::headeronly::toString(dtype));
  Tensor out = empty(codes, {numel}, dtype);
  const TensorView values = view(op, "out", out);
  on_device(
      op, codes, [&] { cpu::nf4_decode(values, x); },
      [&](auto stream) { cuda::nf4_decode(values, x, stream); });
  return out;
}

template <class Library>
void register_ops(Library& m) {
  m.impl("nf4_encode", TORCH_BOX(&nf4_encode));
  m.impl("nf4_decode", TORCH_BOX(&nf4_decode));
}

}  // namespace

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
