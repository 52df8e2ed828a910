#include <tuple>

#include "device.h"
#include "quaver/optimizer.h"

namespace quaver::binding {
namespace {

StateView view_of(const char* op, const Tensor& q, const Tensor& scale, bool expand) {
  const TensorView values = view(op, "q", q);
  const int64_t groups = group_count(values.numel());
  return {values, floats(op, "scale", scale, groups), nullptr,
          expand ? Scaling::expand : Scaling::group};
}

std::tuple<Tensor, Tensor> encode_state(const Tensor& x_in, ScalarType dtype, bool expand) {
  const Tensor x = dense(x_in);
  Tensor q = empty(x, shape_of(x), dtype);
  Tensor scale = empty(x, {group_count(x.numel())}, ScalarType::Float);
  const StateView state = view_of("encode_state", q, scale, expand);
  const TensorView values = view("encode_state", "x", x);
  on_device(
      "encode_state", x, [&] { cpu::encode_state(state, values); },
      [&](auto stream) { cuda::encode_state(state, values, stream); });
  return {q, scale};
}

Tensor decode_state(const Tensor& q_in, const Tensor& scale_in, bool expand) {
  const Tensor q = dense(q_in), scale = dense(scale_in);
  check_device("decode_state", q, "scale", scale);
  const StateView state = view_of("decode_state", q, scale, expand);
  Tensor out = empty(q, shape_of(q), ScalarType::Float);
  const TensorView values = view("decode_state", "out", out);
  on_device(
      "decode_state", q, [&] { cpu::decode_state(values, state); },
      [&](auto stream) { cuda::decode_state(values, state, stream); });
  return out;
}

template <class Library>
void register_ops(Library& m) {
  m.impl("encode_state", TORCH_BOX(&encode_state));
  m.impl("decode_state", TORCH_BOX(&decode_state));
}

}  // namespace

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
