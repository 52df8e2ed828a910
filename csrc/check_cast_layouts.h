// Checks of cast_layouts and of results in layouts, the same for both backends.
#pragma once

#include "quaver/cast_layouts.h"
#include "quaver/check.h"

namespace quaver {

inline void check_operand(const char* op, const char* name, const Operand& o, const Layout& layout,
                          int64_t rows, int64_t cols) {
  if (!o.wanted()) return;
  QUAVER_CHECK(is_fp8(o.codes.dtype), op, ": dtype must be e4m3 or e5m2, got ",
               name_of(o.codes.dtype));
  const int64_t r = gemm_padded(rows), c = gemm_padded(cols);
  QUAVER_CHECK(o.codes.rows == r && o.codes.cols == c, op, ": ", name, " of [", rows, ", ", cols,
               "] must be [", r, ", ", c, "], got [", o.codes.rows, ", ", o.codes.cols, "]");
  const int64_t scales = layout.scale_count(o.codes);
  QUAVER_CHECK(o.scale.dtype == DType::f32 && o.scale.numel() == scales, op, ": ", name, " wants ",
               scales, " f32 scales, got ", o.scale.numel(), " ", name_of(o.scale.dtype));
}

// The layouts of a matrix [rows, cols].
inline void check_layouts(const char* op, const LayoutsCast& to, int64_t rows, int64_t cols) {
  QUAVER_CHECK(!to.tiles_t || to.grain == Grain::block, op,
               ": tiles_t goes with granularity block alone");
  check_operand(op, "q", to.q, to.layout(), rows, cols);
  check_operand(op, "qt", to.qt, to.layout_t(), cols, rows);
  QUAVER_CHECK(!to.q.wanted() || !to.qt.wanted() || to.q.codes.dtype == to.qt.codes.dtype, op,
               ": q and qt must have one dtype");
}

inline void check_cast_layouts(const LayoutsCast& to, const TensorView& x) {
  const char* op = "cast_layouts";
  QUAVER_CHECK(to.grain != Grain::tensor, op, ": granularity must be row, block or tile");
  QUAVER_CHECK(!is_fp8(x.dtype), op, ": x must be f32, f16 or bf16, got ", name_of(x.dtype));
  check_layouts(op, to, x.rows, x.cols);
}

// The result [rows, cols] of a fused op in blocks.
inline void check_blocks(const char* op, const LayoutsCast& to, int64_t rows, int64_t cols) {
  QUAVER_CHECK(to.grain == Grain::block, op, ": granularity must be block");
  QUAVER_CHECK(to.q.wanted() || rows * cols == 0, op, ": q is needed");
  check_layouts(op, to, rows, cols);
}

}  // namespace quaver
