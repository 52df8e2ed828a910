// Layout: the values of a tensor that share a scale.
#pragma once

#include "quaver/tensor_view.h"

namespace quaver {

// All of them, those of a row, or those of each 1 x block along the last axis.
enum class Grain : int8_t { tensor, row, block };

constexpr int64_t blocks_in_row(int64_t cols, int64_t block) { return (cols + block - 1) / block; }

struct Layout {
  Grain grain = Grain::tensor;
  int64_t block = 128;  // of Grain::block

  // Values of a row of `cols` under one scale, and its scales; not for Grain::tensor.
  int64_t width(int64_t cols) const { return grain == Grain::block ? block : cols; }
  int64_t scales_in_row(int64_t cols) const {
    return grain == Grain::block ? blocks_in_row(cols, block) : 1;
  }
  int64_t scale_count(const TensorView& x) const {
    return grain == Grain::tensor ? 1 : x.rows * scales_in_row(x.cols);
  }
};

}  // namespace quaver
