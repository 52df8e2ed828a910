// A borrowed, contiguous tensor: what every core function takes. The caller owns the memory.
#pragma once

#include "quaver/check.h"
#include "quaver/dtype.h"

namespace quaver {

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0;  // all axes but the last
  int64_t cols = 0;  // the last axis; a 0-D tensor is 1 x 1

  int64_t numel() const { return rows * cols; }
  template <class T> T* as() const { return static_cast<T*>(data); }
};

}  // namespace quaver
