// The loops of simd_cast.cpp over a tile, compiled and chosen like those of simd.h.
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
  // Bits of the largest magnitude of each row and of each column, as a non-negative f32; any NaN
  // gives a NaN.
  void (*measure)(uint32_t* row_bits, uint32_t* col_bits, const TilePart& x);
  // out[r][c] = encode(x[r][c] / scale[r]), or / scale[c]; `stride` codes a row. Nearest,
  // saturating.
  void (*cast_rows)(uint8_t* out, DType out_type, int64_t stride, const TilePart& x,
                    const float* scale);
  void (*cast_columns)(uint8_t* out, DType out_type, int64_t stride, const TilePart& x,
                       const float* scale);
};

const CastSimd& cast_simd();

}  // namespace quaver::cpu
