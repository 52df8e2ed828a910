// Squares of a matrix, which are cast to the layouts that products read (quaver/cast_layouts.h) as
// they lie in memory, or as a fused op computes them.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "simd_cast.h"

namespace quaver::cpu {

// A square of a matrix, kScaleTile on a side except at the edges.
struct Square {
  int64_t row, col;
  TilePart x;
};

// The values of a square that a fused op computes, and the square around them.
struct SquareBuffer {
  alignas(64) float values[kScaleTile * kScaleTile];

  float* row(int64_t r) { return values + r * kScaleTile; }
  Square at(const Square& s) const {
    return {s.row, s.col, {values, DType::f32, kScaleTile, s.x.rows, s.x.cols}};
  }
};

// body(square) for each square of x.
template <class Body>
void for_squares(const TensorView& x, Body body) {
  const int64_t across = blocks_in_row(x.cols, kScaleTile);
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across * kScaleTile, col = i % across * kScaleTile;
      const char* first = x.as<const char>() + (row * x.cols + col) * size_of(x.dtype);
      body(Square{row,
                  col,
                  {first, x.dtype, x.cols, std::min(kScaleTile, x.rows - row),
                   std::min(kScaleTile, x.cols - col)}});
    }
  };
  parallel_for(blocks_in_row(x.rows, kScaleTile) * across, kGrain / (kScaleTile * kScaleTile), run);
}

// Casts a square in blocks or tiles, which need no other square.
void cast_square(const LayoutsCast& to, const Square& s);

// Writes what no square of [rows, cols] writes: zero codes beyond them, and the scales of zeros.
void clear_layouts(const LayoutsCast& to, int64_t rows, int64_t cols);

}  // namespace quaver::cpu
