// The loops of simd_cast.cpp over columns of a tile, compiled and chosen like those of simd.h.
#pragma once

#include "quaver/cast_layouts.h"

namespace quaver::cpu {

// A part of a matrix, at most kScaleTile rows and columns.
struct TilePart {
  const void* first;
  DType type;
  int64_t stride, rows, cols;  // in elements
};

struct CastSimd {
  // Bits of each column's largest magnitude as a non-negative f32; any NaN gives a NaN.
  void (*column_amaxes)(uint32_t* bits, const TilePart& x);
  // out[r][c] = encode(x[r][c] / scale[c]), of kScaleTile codes a row. Nearest, saturating.
  void (*cast_columns)(uint8_t* out, DType out_type, const TilePart& x, const float* scale);
};

const CastSimd& cast_simd();

}  // namespace quaver::cpu
