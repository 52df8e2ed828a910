// A tile of 128 x 128 FP8 codes in shared memory, written by rows and read by columns, 16 bytes at
// a time, without bank conflicts.
//
// A row is 8 chunks of 16 bytes. Chunk c of row r lies at c ^ (r / 16): a warp that stores rows
// (8 threads for each of 4 rows) and a warp that reads columns (8 strips of 16 rows times the 4
// words of one chunk) both touch every bank once.
#pragma once

#include <algorithm>

#include "vector.h"

namespace quaver::cuda {

constexpr int kTile = 128;
constexpr int kChunks = kTile / kVector;             // of a row, and strips of rows
constexpr int kPasses = kTile * kTile / kBlockSpan;  // of the whole block over a tile
constexpr int kPassRows = kTile / kPasses;

// A matrix in tiles, in rows of tiles; the tiles of one row of them are neighbours.
struct Tiles {
  int64_t rows, cols, across;
};

inline Tiles make_tiles(int64_t rows, int64_t cols) {
  return {rows, cols, std::max<int64_t>(1, ceil_div(cols, kTile))};
}

inline int64_t tile_count(const Tiles& t) { return ceil_div(t.rows, kTile) * t.across; }

// The row and chunk of a tile that a thread casts in one pass.
struct TilePlace {
  int row, chunk;
};

QUAVER_DEVICE TilePlace place_in_pass(int pass, int thread) {
  return {pass * kPassRows + thread / kChunks, thread % kChunks};
}

struct alignas(16) Tile {
  uint4 chunk[kTile][kChunks];
};

QUAVER_DEVICE void put_codes(Tile& tile, TilePlace at, const Packed<1>& v) {
  tile.chunk[at.row][at.chunk ^ (at.row / kVector)] =
      uint4{v.word[0], v.word[1], v.word[2], v.word[3]};
}

// Four codes at column 4 * word.
QUAVER_DEVICE void put_word(Tile& tile, int row, int word, uint32_t codes) {
  reinterpret_cast<uint32_t*>(&tile.chunk[row][(word / 4) ^ (row / kVector)])[word % 4] = codes;
}

// a b c d -> the four words of a 4 x 4 byte transpose.
QUAVER_DEVICE void transpose4(uint32_t (&r)[4]) {
  const uint32_t low01 = __byte_perm(r[0], r[1], 0x5140), high01 = __byte_perm(r[0], r[1], 0x7362);
  const uint32_t low23 = __byte_perm(r[2], r[3], 0x5140), high23 = __byte_perm(r[2], r[3], 0x7362);
  r[0] = __byte_perm(low01, low23, 0x5410);
  r[1] = __byte_perm(low01, low23, 0x7632);
  r[2] = __byte_perm(high01, high23, 0x5410);
  r[3] = __byte_perm(high01, high23, 0x7632);
}

// Writes the tile whose first element is (row0, col0) to qt [cols, rows]: each thread 4 columns of
// 16 rows. The block must have synchronised after its put_codes.
QUAVER_DEVICE void store_transposed(uint8_t* qt, const Tile& tile, const Tiles& t, int64_t row0,
                                    int64_t col0, int thread, bool aligned) {
  const int strip = thread % kChunks;
  const int word = thread / kChunks;  // of a row: 4 columns
  const int64_t row = row0 + strip * kVector, col = col0 + word * 4;
  if (row >= t.rows || col >= t.cols) return;
  Packed<1> column[4];
#pragma unroll
  for (int i = 0; i < kVector; i += 4) {
    uint32_t r[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      r[k] = reinterpret_cast<const uint32_t*>(
          &tile.chunk[strip * kVector + i + k][(word / 4) ^ strip])[word % 4];
    transpose4(r);
#pragma unroll
    for (int c = 0; c < 4; ++c) column[c].word[i / 4] = r[c];
  }
#pragma unroll
  for (int c = 0; c < 4; ++c)
    if (col + c < t.cols) store(qt + (col + c) * t.rows + row, column[c], 1, t.rows - row, aligned);
}

}  // namespace quaver::cuda
