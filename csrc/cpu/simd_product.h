// The loops of simd_product.cpp, of which a product of FP8 operands consists (gemm.cpp).
#pragma once

#include <cstdint>

#include "quaver/dtype.h"

namespace quaver::cpu {

constexpr int64_t kMostSums = 6 * 64;  // of a tile, on any machine

// Rows of an operand's codes, `stride` codes apart, of which the first k are read.
struct CodeRows {
  const uint8_t* first;
  DType type;
  int64_t stride, rows, k;
};

// Scales of a tile's rows and columns.
struct TileScales {
  const float *rows, *cols;
};

// Where a tile of sums goes: out = total + sum * scales + bias, or + out.
struct ProductTile {
  void* out;
  DType type;          // f32 or bf16
  int64_t stride;      // values from a row of out to the next
  int64_t rows, cols;  // that out has of the tile
  TileScales scales;   // of the sums
  const float* total;  // of the parts of K before, like the sums, or none
  const float* bias;   // one for each column, or none
  bool accumulate;
};

// Operands are decoded to words of 32 bits: an f32, or two bf16 that are neighbours in K. A row has
// a whole number of steps of them, those beyond K being zero.
struct ProductSimd {
  int64_t rows, cols;  // of a tile of sums: as many rows of a, and of b
  int64_t depth;       // values in a word
  int64_t step;        // words
  // out[r][w], `pitch` words a row.
  void (*decode_rows)(uint32_t* out, int64_t pitch, const CodeRows& a);
  // out[w][c] of at most `cols` rows of b; missing ones are zero.
  void (*pack_columns)(uint32_t* out, const CodeRows& b);
  // sums[r][c] = the products of a's row r and b's row c, added in the order of K. Fetches `next`,
  // which of b is needed then.
  void (*multiply)(float* sums, const uint32_t* a, int64_t pitch, const uint32_t* b, int64_t rows,
                   int64_t words, const uint32_t* next);
  // total = sums * scales, or + it.
  void (*add)(float* total, const float* sums, const TileScales& scales, int64_t rows, bool first);
  void (*finish)(const ProductTile& tile, const float* sums);
};

// Null where torch's own product is faster: on a machine without vectors, or one that multiplies
// tiles of bf16 (AMX).
const ProductSimd* product_simd();

}  // namespace quaver::cpu
