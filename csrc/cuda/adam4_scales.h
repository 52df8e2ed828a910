// The scales of a 4-bit second moment (quaver/adam4.h), for threads that step flat elements, and
// for blocks that step a panel: 128 to 512 columns of 256 to 64 rows. A block keeps the numbers of
// a panel's rows and columns in shared memory, since those of columns, read at each element, would
// be more bytes than the gradient.
#pragma once

#include <algorithm>

#include "quaver/adam4.h"
#include "runtime_type.h"

namespace quaver::cuda {

// Where a thread is in a matrix of all axes but the last by the last.
struct Walk {
  int64_t row, column;
};

QUAVER_DEVICE Walk walk_from(const Shape& shape, int64_t i) {
  return {i / columns_of(shape), i % columns_of(shape)};
}

// Goes on to the next element; returns whether it begins a row.
QUAVER_DEVICE bool next(Walk& at, const Shape& shape) {
  if (++at.column < columns_of(shape)) return false;
  at.column = 0;
  ++at.row;
  return true;
}

// The scales of a thread's elements, flat ones, in a second moment, or the values of a factored
// one.
QUAVER_DEVICE void load_scales(Second second, const Shape& shape, int64_t numel,
                               const float* scales, int64_t i, int64_t n, float (&scale)[kVector]) {
  if (second == Second::block) {
    const float of_group = n > 0 ? scales[i / kGroup] : 0.0f;
#pragma unroll
    for (int j = 0; j < kVector; ++j) scale[j] = of_group;
    return;
  }
  const bool rank1 = second == Second::rank1;
  const int64_t rows = numel / columns_of(shape);
  Walk at = walk_from(shape, i);
  float of_row = 0.0f;
  const float* columns = nullptr;
  bool begins = true;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    scale[j] = 0.0f;
    if (j >= n) continue;
    if (begins) {
      of_row = rank1 ? row_scale(shape, scales, at.row) : scales[at.row];
      columns = rank1 ? scales + column_slots(shape) : factor_columns(shape, scales, rows, at.row);
    }
    const float of_column = columns[at.column];
    scale[j] = rank1 ? least_of(of_row, of_column) : of_row * of_column;
    begins = next(at, shape);
  }
}

constexpr int kTurns = 8;  // rows of a thread in a panel
constexpr int kPanelColumns = kWarp * kVector;
constexpr int kPanelRows = int(kBlockSpan * kTurns / kGroup);
static_assert(kPanelRows == kThreads, "a thread fills the number of one row");

// How a tensor is cut into panels. A factored tensor of more than two axes is a stack of matrices,
// each with numbers of its own; a panel has rows of one.
struct Panels {
  int64_t rows, cols;    // of a matrix
  int64_t across, down;  // panels of a matrix
  int chunk_bits;        // log2 of a panel's columns over 16; 0: none, blocks have flat elements
};

// Panels are for rows that whole groups fill; their width leaves no thread of a warp without
// elements.
inline Panels make_panels(const Shape& shape, Second second, int64_t numel, bool aligned) {
  Panels p = {};
  const int64_t cols = columns_of(shape);
  if (second == Second::block || !aligned || numel == 0 || cols % kGroup != 0) return p;
  p.chunk_bits = cols % kPanelColumns == 0 ? 5 : cols % (kPanelColumns / 2) == 0 ? 4 : 3;
  p.cols = cols;
  p.rows = second == Second::factor ? shape.size[shape.axes - 2] : numel / cols;
  p.across = cols / kVector >> p.chunk_bits;
  p.down = ceil_div(p.rows, int64_t(kThreads >> p.chunk_bits) * kTurns);
  return p;
}

inline int64_t panel_count(const Panels& p, int64_t numel) {
  return numel / (p.rows * p.cols) * p.across * p.down;
}

// A thread has 16 columns, a chunk, of each `strands`-th row of a panel, from its strand on.
QUAVER_DEVICE int strands_of(const Panels& p) { return kThreads >> p.chunk_bits; }
QUAVER_DEVICE int chunks_of(const Panels& p) { return 1 << p.chunk_bits; }
QUAVER_DEVICE int strand_of(const Panels& p) { return int(threadIdx.x) >> p.chunk_bits; }
QUAVER_DEVICE int chunk_of(const Panels& p) { return int(threadIdx.x) & (chunks_of(p) - 1); }

// A panel: its first row and column in the tensor, and the rows that it has.
struct Panel {
  int64_t row, col;
  int rows;
};

QUAVER_DEVICE Panel panel_at(const Panels& p, uint32_t block) {
  const auto across = static_cast<uint32_t>(p.across), down = static_cast<uint32_t>(p.down);
  const uint32_t stripe = block / across;
  const int most = strands_of(p) * kTurns;
  const int64_t first = int64_t(stripe % down) * most, left = p.rows - first;
  return {stripe / down * p.rows + first, int64_t(block % across) * chunks_of(p) * kVector,
          left < most ? int(left) : most};
}

// Places of four columns each, turned so that neither eight threads with 16 columns each nor 32
// with one column meet in a bank.
QUAVER_DEVICE int place_of_four(int chunk, int four) {
  return chunk * kQuads + (four ^ (chunk >> 1 & 3));
}

QUAVER_DEVICE int place_of_column(int column) {
  const int chunk = column / kVector;
  return place_of_four(chunk, column % kVector / kQuad) * kQuad + column % kQuad;
}

struct alignas(16) PanelNumbers {
  float columns[kPanelColumns];
  float rows[kPanelRows];
};

// Fills the numbers of a panel. All threads of the block call it, and synchronise before the first
// use.
QUAVER_DEVICE void fill(PanelNumbers& to, const Panel& at, const Panels& panels, Second second,
                        const Shape& shape, const float* numbers, int64_t all_rows) {
  const bool rank1 = second == Second::rank1;
  const float* columns =
      rank1 ? numbers + column_slots(shape) : factor_columns(shape, numbers, all_rows, at.row);
  for (int c = threadIdx.x; c < chunks_of(panels) * kVector; c += kThreads)
    to.columns[place_of_column(c)] = columns[at.col + c];
  float of_row = 0.0f;  // of rows that the panel lacks
  if (int(threadIdx.x) < at.rows) {
    const int64_t row = at.row + threadIdx.x;
    of_row = rank1 ? row_scale(shape, numbers, row) : numbers[row];
  }
  to.rows[threadIdx.x] = of_row;
}

// The scales of a thread's elements in a row of the panel, or the values of a factored moment.
QUAVER_DEVICE void scales_of_row(const PanelNumbers& numbers, const Panels& panels, int row,
                                 Second second, float (&scale)[kVector]) {
  const float of_row = numbers.rows[row];
  const int chunk = chunk_of(panels);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const uint4 bits = reinterpret_cast<const uint4*>(numbers.columns)[place_of_four(chunk, q)];
    const float columns[kQuad] = {bit_cast<float>(bits.x), bit_cast<float>(bits.y),
                                  bit_cast<float>(bits.z), bit_cast<float>(bits.w)};
#pragma unroll
    for (int j = 0; j < kQuad; ++j)
      scale[q * kQuad + j] =
          second == Second::rank1 ? least_of(of_row, columns[j]) : of_row * columns[j];
  }
}

}  // namespace quaver::cuda
