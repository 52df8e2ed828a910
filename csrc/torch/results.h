// Results that several ops share: a cast to both GEMM layouts, and group-quantised copies.
#pragma once

#include "../arguments.h"
#include "device.h"
#include "quaver/cast.h"

namespace quaver::binding {

// A fresh scale tensor, holding the given scale where there is one.
inline Tensor scale_tensor(const char* op, const Tensor& x, const OptionalTensor& given,
                           const Shape& shape) {
  Tensor scale = empty(x, shape, ScalarType::Float);
  check_device(op, x, "scale", given);
  if (!given.has_value()) return scale;
  QUAVER_CHECK(given->numel() == scale.numel() && given->scalar_type() == ScalarType::Float, op,
               ": scale must be ", scale.numel(), " float32, got ", given->numel(), " of ",
               torch::headeronly::toString(given->scalar_type()));
  torch::stable::copy_(scale, torch::stable::reshape(*given, shape));
  return scale;
}

inline TensorView optional_view(const char* op, const char* name, const OptionalTensor& t) {
  return t.has_value() ? present(op, name, *t) : TensorView{};
}

// The state of delayed scaling, which the op reads and updates.
inline float* history_of(const char* op, const Tensor& like, const OptionalTensor& t) {
  check_device(op, like, "history", t);
  return floats(op, "history", t, kHistoryState);
}

inline void check_matrix(const char* op, const char* name, const Tensor& t) {
  QUAVER_CHECK(t.dim() == 2, op, ": ", name, " must be a matrix, got ", t.dim(), " dimensions");
}

// The device memory of a call's cast.
class CastMemory {
 public:
  explicit CastMemory(const Tensor& x, bool needed = true)
      : memory_(empty(x, {needed ? bytes(view("cast", "x", x)) : 0}, ScalarType::Byte)) {}
  CastMemory(const Tensor& like, int64_t rows, int64_t cols)
      : memory_(workspace(like, bytes({nullptr, DType::f32, rows, cols}))) {}
  ScaleSource with(ScaleSource source) const {
    source.workspace = memory_.data_ptr();
    return source;
  }

 private:
  static int64_t bytes([[maybe_unused]] const TensorView& x) {
#if defined(QUAVER_HAVE_CUDA)
    return cuda::cast_workspace_bytes(x.rows, x.cols);
#else
    return 0;
#endif
  }
  Tensor memory_;
};

struct CastResult {
  Tensor q, qt, scale, amax;
  GemmCast view;
};

// Allocates the cast of an op's result [rows, cols].
inline CastResult cast_result(const char* op, const Tensor& like, int64_t rows, int64_t cols,
                              ScalarType dtype, const OptionalTensor& scale,
                              const OptionalTensor& history, bool power_of_two) {
  const int64_t r = gemm_padded(rows), c = gemm_padded(cols);
  CastResult result = {empty(like, {r, c}, dtype),
                       empty(like, {c, r}, dtype),
                       scale_tensor(op, like, scale, {}),
                       empty(like, {}, ScalarType::Float),
                       {}};
  result.view.q = view(op, "dtype", result.q);
  result.view.qt = view(op, "dtype", result.qt);
  result.view.scale = scalar(op, "scale", result.scale);
  result.view.amax = scalar(op, "amax", result.amax);
  result.view.power_of_two = power_of_two;
  result.view.source.given = scale.has_value();
  result.view.source.history = history_of(op, like, history);
  return result;
}

// Empty tensors for an absent output.
inline CastResult no_cast_result(const Tensor& like, ScalarType dtype) {
  const auto none = [&](ScalarType type) { return empty(like, {0}, type); };
  return {none(dtype), none(dtype), none(ScalarType::Float), none(ScalarType::Float), {}};
}

struct GroupedResult {
  Tensor codes, scale;
  GroupedView view;
};

inline GroupedView grouped_view(const char* op, const char* name, const Tensor& codes,
                                const char* scale_name, const Tensor& scale, int64_t block) {
  check_block(op, {Grain::block, block});
  check_matrix(op, name, codes);
  GroupedView v;
  v.codes = present(op, name, codes);
  const int64_t rows = codes.size(0), groups = blocks_in_row(codes.size(1), block);
  QUAVER_CHECK(scale.scalar_type() == ScalarType::Byte, op, ": ", scale_name,
               " must be uint8, got ", torch::headeronly::toString(scale.scalar_type()));
  QUAVER_CHECK(
      scale.dim() == 2 && scale.size(0) == rows && scale.size(1) == groups && scale.is_contiguous(),
      op, ": ", scale_name, " must be [", rows, ", ", groups, "] for block ", block, ", got ",
      scale.numel(), " values");
  v.scale = static_cast<uint8_t*>(scale.data_ptr());
  v.layout.block = block;
  return v;
}

inline GroupedResult grouped_result(const char* op, const Tensor& like, int64_t rows, int64_t cols,
                                    int64_t block) {
  check_block(op, {Grain::block, block});
  GroupedResult r = {empty(like, {rows, cols}, ScalarType::Float8_e4m3fn),
                     empty(like, {rows, blocks_in_row(cols, block)}, ScalarType::Byte),
                     {}};
  r.view = grouped_view(op, "codes", r.codes, "scales", r.scale, block);
  return r;
}

inline GroupedResult no_grouped_result(const Tensor& like) {
  return {empty(like, {0}, ScalarType::Float8_e4m3fn), empty(like, {0}, ScalarType::Byte), {}};
}

}  // namespace quaver::binding
