// torch::stable::Tensor to TensorView, and the checks every binding makes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "quaver/tensor_view.h"

namespace quaver::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

inline DType dtype_of(const char* op, const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Float8_e4m3fn: return DType::e4m3;
    case ScalarType::Float8_e5m2: return DType::e5m2;
    default: break;
  }
  fail(op, ": ", name, " must be float32, float16, bfloat16, float8_e4m3fn or float8_e5m2, got ",
       torch::headeronly::toString(type));
}

inline TensorView view(const char* op, const char* name, const Tensor& t) {
  QUAVER_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
  TensorView v;
  v.data = t.data_ptr();
  v.dtype = dtype_of(op, name, t.scalar_type());
  v.cols = t.dim() == 0 ? 1 : t.size(t.dim() - 1);
  v.rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) v.rows *= t.size(d);
  return v;
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Shape shape_of(const Tensor& t) {
  Shape shape;
  for (int64_t d = 0; d < t.dim(); ++d) shape.push_back(t.size(d));
  return shape;
}

inline Tensor empty(const Tensor& like, const Shape& shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

// The one f32 of a scale, amax or norm.
inline float* scalar(const char* op, const char* name, const Tensor& t) {
  QUAVER_CHECK(t.numel() == 1 && t.scalar_type() == ScalarType::Float, op, ": ", name,
               " must be one float32, got ", t.numel(), " of ",
               torch::headeronly::toString(t.scalar_type()));
  return static_cast<float*>(t.data_ptr());
}

// In a list, an empty tensor stands for "none".
inline float* optional_scalar(const char* op, const char* name, const Tensor& t) {
  return t.numel() == 0 ? nullptr : scalar(op, name, t);
}

inline float* history_of(const char* op, const OptionalTensor& t, int64_t length) {
  if (!t.has_value()) return nullptr;
  QUAVER_CHECK(t->numel() == length && t->scalar_type() == ScalarType::Float && t->is_contiguous(),
               op, ": history must be ", length, " contiguous float32, got ", t->numel(), " of ",
               torch::headeronly::toString(t->scalar_type()));
  return static_cast<float*>(t->data_ptr());
}

}  // namespace quaver::binding
