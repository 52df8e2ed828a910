// A tile of 128 x 128 FP8 codes in shared memory, written by rows and read by columns, 16 bytes at
// a time, without bank conflicts.
//
// A row is 8 chunks of 16 bytes. Chunk c of row r lies at c ^ turn_of(r), which depends on r / 16,
// so that a warp that reads columns (8 strips of 16 rows times the 4 words of one chunk) touches
// every bank once, and on r % 4, so that one that stores rows does (8 threads for each of 4 rows,
// 4, 8 or 16 bytes a thread).
#pragma once

#include <algorithm>

#include "runs.h"

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

// The row of a tile that a thread casts in one pass, and which of the row's 8 threads it is.
struct TilePlace {
  unsigned row, chunk;
};

// The distance between a thread's runs in a row.
template <int kRun>
constexpr int kRunsApart = kChunks * kRun;

// The first column of a thread in a tile.
template <int kRun>
QUAVER_DEVICE unsigned first_column(TilePlace at) {
  return at.chunk * kRun;
}

QUAVER_DEVICE TilePlace place_in_pass(unsigned pass, unsigned thread) {
  return {pass * kPassRows + thread / kChunks, thread % kChunks};
}

struct alignas(16) Tile {
  uint4 chunk[kTile][kChunks];
};

// Bits 2 and 1 of the turn differ between the rows that a warp stores at once, and bit 2 between
// those of half a warp.
QUAVER_DEVICE unsigned turn_in_four(unsigned row) { return (row & 1) << 2 | (row & 2); }
QUAVER_DEVICE unsigned turn_of(unsigned row) { return row / kVector ^ turn_in_four(row); }

// Four codes at column 4 * word.
QUAVER_DEVICE uint32_t* word_of(Tile& tile, unsigned row, unsigned word) {
  return reinterpret_cast<uint32_t*>(&tile.chunk[row][word / 4 ^ turn_of(row)]) + word % 4;
}

template <int kRun>
QUAVER_DEVICE void put_codes(Tile& tile, TilePlace at, const Packed<1>& v) {
  constexpr int kWords = kRun / 4;
#pragma unroll
  for (int r = 0; r < kVector / kRun; ++r)
    store_words<kWords>(word_of(tile, at.row, at.chunk * kWords + r * kChunks * kWords),
                        v.word + r * kWords);
}

QUAVER_DEVICE void put_word(Tile& tile, unsigned row, unsigned word, uint32_t codes) {
  *word_of(tile, row, word) = codes;
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

// Writes the tile whose first element is (row0, col0) to qt [cols, rows], whose rows are `width`
// codes apart: each thread 4 columns of 16 rows. The block must have synchronised after its
// put_codes.
QUAVER_DEVICE void store_transposed(uint8_t* qt, int64_t width, const Tile& tile, const Tiles& t,
                                    int64_t row0, int64_t col0, unsigned thread, bool aligned) {
  const unsigned strip = thread % kChunks;
  const unsigned word = thread / kChunks;  // of a row: 4 columns
  const int64_t row = row0 + strip * kVector, col = col0 + word * 4;
  if (row >= t.rows || col >= t.cols) return;
  Packed<1> column[4];
#pragma unroll
  for (int i = 0; i < kVector; i += 4) {
    uint32_t r[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      r[k] = reinterpret_cast<const uint32_t*>(
          &tile.chunk[strip * kVector + i + k][word / 4 ^ strip ^ turn_in_four(k)])[word % 4];
    transpose4(r);
#pragma unroll
    for (int c = 0; c < 4; ++c) column[c].word[i / 4] = r[c];
  }
#pragma unroll
  for (int c = 0; c < 4; ++c)
    if (col + c < t.cols) store(qt + (col + c) * width + row, column[c], 1, t.rows - row, aligned);
}

QUAVER_DEVICE void store_transposed(uint8_t* qt, const Tile& tile, const Tiles& t, int64_t row0,
                                    int64_t col0, unsigned thread, bool aligned) {
  store_transposed(qt, t.rows, tile, t, row0, col0, thread, aligned);
}

}  // namespace quaver::cuda
