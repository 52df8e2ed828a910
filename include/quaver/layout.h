// Layout: the values of a tensor that share a scale.
#pragma once

#include "quaver/tensor_view.h"

namespace quaver {

// All of them, those of a row, those of each 1 x block along the last axis, or those of each square
// of kScaleTile rows and columns.
enum class Grain : int8_t { tensor, row, block, tile };

constexpr int64_t kScaleTile = 128;

constexpr int64_t blocks_in_row(int64_t cols, int64_t block) { return (cols + block - 1) / block; }

struct Layout {
  Grain grain = Grain::tensor;
  int64_t block = 128;  // of Grain::block

  // Columns and rows under one scale, and the scales along each axis; not for Grain::tensor.
  int64_t width(int64_t cols) const {
    return grain == Grain::block ? block : grain == Grain::tile ? kScaleTile : cols;
  }
  int64_t height() const { return grain == Grain::tile ? kScaleTile : 1; }
  int64_t scales_in_row(int64_t cols) const {
    return grain == Grain::row ? 1 : blocks_in_row(cols, width(cols));
  }
  int64_t scale_rows(int64_t rows) const { return blocks_in_row(rows, height()); }
  int64_t scale_count(const TensorView& x) const {
    return grain == Grain::tensor ? 1 : scale_rows(x.rows) * scales_in_row(x.cols);
  }
};

}  // namespace quaver
