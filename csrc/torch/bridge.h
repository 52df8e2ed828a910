// torch::stable::Tensor to TensorView, and the checks every binding makes.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <optional>
#include <vector>

#include "quaver/tensor_view.h"
#include "stable.h"

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

// Memory that torch did not allocate may begin anywhere.
inline bool is_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % static_cast<uintptr_t>(t.element_size()) == 0;
}

inline void check_aligned(const char* op, const char* name, const Tensor& t) {
  QUAVER_CHECK(is_aligned(t), op, ": ", name, " must start at a multiple of ", t.element_size(),
               " bytes, got ", t.data_ptr());
}

inline TensorView view(const char* op, const char* name, const Tensor& t) {
  QUAVER_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
  check_aligned(op, name, t);
  TensorView v;
  v.data = t.data_ptr();
  v.dtype = dtype_of(op, name, t.scalar_type());
  v.cols = t.dim() == 0 ? 1 : t.size(t.dim() - 1);
  v.rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) v.rows *= t.size(d);
  return v;
}

// A view whose data is never null, even of a tensor without elements: null means an absent tensor.
inline TensorView present(const char* op, const char* name, const Tensor& t) {
  static char nothing[16];
  TensorView v = view(op, name, t);
  if (v.data == nullptr) v.data = nothing;
  return v;
}

// An argument that is only read, as `view` takes it.
inline Tensor dense(const Tensor& t) {
  if (!t.is_contiguous()) return torch::stable::contiguous(t);
  return is_aligned(t) ? t : torch::stable::clone(t);
}

inline OptionalTensor dense(const OptionalTensor& t) {
  return t.has_value() ? OptionalTensor(dense(*t)) : t;
}

inline Shape shape_of(const Tensor& t) {
  Shape shape;
  for (int64_t d = 0; d < t.dim(); ++d) shape.push_back(t.size(d));
  return shape;
}

// Requests huge pages for a large result before its first touch: mapping it by 4 KiB pages takes
// longer than writing it in FP8. A refusal changes nothing.
inline void prefer_huge_pages(const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t huge = uintptr_t(1) << 21;
  const auto bytes = static_cast<uintptr_t>(t.numel() * t.element_size());
  if (bytes < 2 * huge || !t.is_cpu()) return;
  const auto begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t first = (begin + huge - 1) / huge * huge, last = (begin + bytes) / huge * huge;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Contiguous, on the device of `like`. By torch's allocator directly: new_empty goes through the
// dispatcher, which takes longer than the allocation.
inline Tensor empty(const Tensor& like, const Shape& shape, ScalarType type) {
  constexpr size_t most = 8;  // axes; more take memory of their own
  int64_t few[most];
  Shape many(shape.size() > most ? shape.size() : 0);
  int64_t* strides = many.empty() ? few : many.data();
  for (size_t d = shape.size(), step = 1; d-- > 0;
       step *= static_cast<size_t>(std::max<int64_t>(shape[d], 1)))
    strides[d] = static_cast<int64_t>(step);
  int32_t kind = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &kind));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), kind, index, &made));
  Tensor t(made);
  prefer_huge_pages(t);
  return t;
}

// The data of a scale, amax or norm: one f32.
inline float* scalar(const char* op, const char* name, const Tensor& t) {
  QUAVER_CHECK(t.numel() == 1 && t.scalar_type() == ScalarType::Float, op, ": ", name,
               " must be one float32, got ", t.numel(), " of ",
               torch::headeronly::toString(t.scalar_type()));
  check_aligned(op, name, t);
  return static_cast<float*>(t.data_ptr());
}

// The data of `count` contiguous f32; never null.
inline float* floats(const char* op, const char* name, const Tensor& t, int64_t count) {
  QUAVER_CHECK(t.numel() == count && t.scalar_type() == ScalarType::Float && t.is_contiguous(), op,
               ": ", name, " must be ", count, " contiguous float32, got ", t.numel(), " of ",
               torch::headeronly::toString(t.scalar_type()));
  return static_cast<float*>(present(op, name, t).data);
}

inline float* floats(const char* op, const char* name, const OptionalTensor& t, int64_t count) {
  return t.has_value() ? floats(op, name, *t, count) : nullptr;
}

// An empty tensor in a list stands for none.
inline float* optional_scalar(const char* op, const char* name, const Tensor& t) {
  return t.numel() == 0 ? nullptr : scalar(op, name, t);
}

}  // namespace quaver::binding
