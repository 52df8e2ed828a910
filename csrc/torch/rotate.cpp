#include "quaver/rotate.h"

#include <string>

#include "device.h"

namespace quaver::binding {
namespace {

// Heads whose values are neighbours, as a kernel reads them.
Tensor with_neighbours(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? (is_aligned(t) ? t : torch::stable::clone(t))
                                            : torch::stable::contiguous(t);
}

std::string sizes_of(const Tensor& t) {
  std::string sizes;
  for (const int64_t n : shape_of(t)) sizes += (sizes.empty() ? "" : ", ") + std::to_string(n);
  return "[" + sizes + "]";
}

Tensor table(const char* op, const char* name, const Tensor& t, const Rotation& r) {
  QUAVER_CHECK(t.dim() == 2 && t.size(0) == r.length && t.size(1) == r.head_dim &&
                   t.scalar_type() == ScalarType::Float,
               op, ": ", name, " must be float32 [", r.length, ", ", r.head_dim, "], got ",
               torch::headeronly::toString(t.scalar_type()), " ", sizes_of(t));
  return dense(t);
}

Tensor rotate(const std::vector<Tensor>& parts, const Tensor& cos_in, const Tensor& sin_in,
              int64_t turned, bool inverse) {
  const char* op = "rotate";
  QUAVER_CHECK(!parts.empty() && parts.size() <= kMostParts, op, ": parts must be 1 to ",
               kMostParts, " tensors, got ", parts.size());
  const Tensor& first = parts[0];
  QUAVER_CHECK(first.dim() == 4, op, ": parts must be [batch, length, heads, head_dim], got ",
               first.dim(), " axes");
  check_device(op, first, "parts", parts);
  check_device(op, first, "cos", cos_in);
  check_device(op, first, "sin", sin_in);
  Rotation r;
  r.dtype = dtype_of(op, "parts", first.scalar_type());
  r.batch = first.size(0);
  r.length = first.size(1);
  r.head_dim = first.size(3);
  r.turned = turned;
  r.inverse = inverse;
  std::vector<Tensor> kept;
  for (const Tensor& t : parts) {
    QUAVER_CHECK(t.dim() == 4 && t.size(0) == r.batch && t.size(1) == r.length &&
                     t.size(3) == r.head_dim && t.scalar_type() == first.scalar_type(),
                 op, ": parts must be alike except for their heads, got ",
                 torch::headeronly::toString(t.scalar_type()), " ", sizes_of(t), " beside ",
                 torch::headeronly::toString(first.scalar_type()), " ", sizes_of(first));
    kept.push_back(with_neighbours(t));
    const Tensor& k = kept.back();
    r.part[r.parts++] = {k.data_ptr(), k.size(2), k.stride(0), k.stride(1), k.stride(2)};
  }
  const Tensor cos = table(op, "cos", cos_in, r), sin = table(op, "sin", sin_in, r);
  r.cos = static_cast<const float*>(cos.data_ptr());
  r.sin = static_cast<const float*>(sin.data_ptr());
  check_rotation(r);
  Tensor out = empty(first, {r.batch, r.length, r.heads(), r.head_dim}, first.scalar_type());
  r.out = out.data_ptr();
  on_device(op, first, [&] { cpu::rotate(r); }, [&](auto stream) { cuda::rotate(r, stream); });
  return out;
}

template <class Library>
void register_ops(Library& m) {
  m.impl("rotate", TORCH_BOX(&rotate));
}

}  // namespace

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
