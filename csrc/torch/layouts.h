// Results that ops write in the layouts that products read, each with scales of its own.
#pragma once

#include "quaver/cast_layouts.h"
#include "results.h"

namespace quaver::binding {

struct OperandResult {
  Tensor codes, scale;
};

// Empty where it is not wanted.
inline OperandResult operand_result(const Tensor& like, int64_t rows, int64_t cols,
                                    ScalarType dtype, const Layout& layout, bool wanted) {
  if (!wanted) return {empty(like, {0}, dtype), empty(like, {0}, ScalarType::Float)};
  const int64_t r = gemm_padded(rows), c = gemm_padded(cols);
  return {empty(like, {r, c}, dtype),
          empty(like, {layout.scale_rows(r), layout.scales_in_row(c)}, ScalarType::Float)};
}

inline Operand operand_view(const char* op, const OperandResult& r, bool wanted) {
  return wanted ? Operand{present(op, "dtype", r.codes), view(op, "scale", r.scale)} : Operand{};
}

inline void check_fp8(const char* op, ScalarType dtype) {
  QUAVER_CHECK(is_fp8(dtype_of(op, "dtype", dtype)), op, ": dtype must be e4m3 or e5m2, got ",
               torch::headeronly::toString(dtype));
}

// Both layouts of an op's result [rows, cols], in 1 x 128 blocks.
struct LayoutsResult {
  OperandResult q, qt;
  LayoutsCast view;
};

inline LayoutsResult layouts_result(const char* op, const Tensor& like, int64_t rows, int64_t cols,
                                    ScalarType dtype, bool tiles_t, bool power_of_two,
                                    bool wanted = true) {
  check_fp8(op, dtype);
  LayoutsResult r;
  r.view.tiles_t = tiles_t;
  r.view.power_of_two = power_of_two;
  r.q = operand_result(like, rows, cols, dtype, r.view.layout(), wanted);
  r.qt = operand_result(like, cols, rows, dtype, r.view.layout_t(), wanted);
  r.view.q = operand_view(op, r.q, wanted);
  r.view.qt = operand_view(op, r.qt, wanted);
  return r;
}

}  // namespace quaver::binding
