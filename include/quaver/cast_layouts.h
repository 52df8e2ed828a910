// Stage "quantize": a matrix cast to the layouts that products read, each with scales of its own:
// one a row (Grain::row), one for each 1 x 128 along the row (block), or one for each 128 x 128
// (tile). DeepSeek-V3 (arXiv 2412.19437, section 3.3.2) has blocks of inputs and gradients, and
// tiles of weights.
#pragma once

#include "quaver/cast.h"

namespace quaver {

// One layout of a matrix: codes padded with zeros to gemm_padded sizes, and f32 scales of the
// padded matrix. No data in `codes`: that layout is not wanted.
struct Operand {
  TensorView codes, scale;

  bool wanted() const { return codes.data != nullptr; }
};

// x [R, C] as q [R, C] and qt [C, R]. Rows and blocks are those of each layout, so its codes are
// its own; a tile's codes are the same in both. With tiles_t q has blocks and qt has tiles, whose
// scales take a 128th of the bytes. A scale whose values are not all finite is NaN, and their codes
// are those of scale 1.
struct LayoutsCast {
  Operand q, qt;
  Grain grain = Grain::block;
  bool power_of_two = false;
  bool tiles_t = false;

  Layout layout() const { return {grain, kScaleTile}; }
  Layout layout_t() const { return {tiles_t ? Grain::tile : grain, kScaleTile}; }
};

namespace cpu {
void cast_layouts(const LayoutsCast& to, const TensorView& x);
}
namespace cuda {
void cast_layouts(const LayoutsCast& to, const TensorView& x, void* stream);
}

}  // namespace quaver
