// Device functions that cast a tile of values to the layouts that products read
// (quaver/cast_layouts.h): cast_layouts has the values in memory, norms and activations in
// registers. Each thread of the block has kVector values in each of kPasses passes.
#pragma once

#include "dispatch.h"
#include "quaver/cast_layouts.h"
#include "transpose_tile.h"

namespace quaver::cuda {

static_assert(kTile == kScaleTile, "a block of threads casts the values of a scale");

// One layout as the kernels write it.
struct Target {
  uint8_t* codes;
  float* scale;
  int64_t per_row;  // scales
  bool aligned;
};

// Both layouts of a matrix.
struct Targets {
  Tiles padded;  // of q
  Target q, qt;
  DType type;
  float finite_max;
  bool power_of_two, tiles_t;
};

inline Target target(const Operand& o, const Layout& layout) {
  if (!o.wanted()) return {};
  return {o.codes.as<uint8_t>(), o.scale.as<float>(), layout.scales_in_row(o.codes.cols),
          is_aligned(o.codes.data)};
}

inline Targets make_targets(const LayoutsCast& to, int64_t rows, int64_t cols) {
  const DType type = to.q.wanted() ? to.q.codes.dtype : to.qt.codes.dtype;
  return {make_tiles(gemm_padded(rows), gemm_padded(cols)),
          target(to.q, to.layout()),
          target(to.qt, to.layout_t()),
          type,
          scale_max(type),
          to.power_of_two,
          to.tiles_t};
}

// The place in shared memory of a column's number. Threads whose runs are 8 columns, of which each
// accesses 4 at once, meet in no bank.
QUAVER_DEVICE int swizzled(int col) { return col ^ (col >> 5 & 1) << 2; }

struct Amaxes {
  uint32_t row[kTile], col[kTile];  // those of columns swizzled
};

// The columns' maxima of each warp, swizzled.
struct alignas(16) WarpMaxima {
  uint32_t of[kThreads / kWarp][kTile];
};

// Scales of columns, swizzled; of a tile the first.
struct alignas(16) ColumnScales {
  float of[kTile];
};

// The shared memory of a tile in blocks.
struct BlocksMemory {
  Tile tile;
  Amaxes amax;
  float row_scale[kTile];
  ColumnScales col_scale;
};

// The column in the tile of element i of a thread.
template <int kRun>
QUAVER_DEVICE int column(int chunk, int i) {
  return chunk * kRun + int(place_in_runs<kRun>(i, kRunsApart<kRun>));
}

// The scale that encodes values of this amax; the written one is NaN where they are not finite.
QUAVER_DEVICE float choose(const Targets& to, uint32_t amax_bits) {
  return scale_from_amax(bit_cast<float>(amax_bits), to.finite_max, to.power_of_two);
}

QUAVER_DEVICE float written(float scale, uint32_t amax_bits) {
  return nan_unless_finite(scale, bit_cast<float>(amax_bits));
}

// The values that a thread keeps in registers.
struct Kept {
  const float (&value)[kPasses][kVector];
};

QUAVER_DEVICE void get_values(const Kept& kept, int pass, float (&v)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) v[i] = kept.value[pass][i];
}

// The memory of a tile before there are codes.
QUAVER_DEVICE WarpMaxima& maxima_in(Tile& tile) {
  static_assert(sizeof(Tile) >= sizeof(WarpMaxima) && alignof(Tile) >= alignof(WarpMaxima),
                "a tile has room for maxima");
  return reinterpret_cast<WarpMaxima&>(tile);
}

// The larger magnitude of two as amax_bits sees them; its sign means nothing.
QUAVER_DEVICE float larger(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
  asm("max.NaN.xorsign.abs.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
#else
  return bit_cast<float>(max_bits(magnitude_bits(a), magnitude_bits(b)));
#endif
}

// Joins the maxima of a warp's threads that have the same columns, 8 apart. Each hands half of its
// kHalf * 2 over and keeps the other half.
template <int kHalf, int kDistance>
QUAVER_DEVICE void join_columns(uint32_t (&most)[kVector]) {
  const bool upper = (threadIdx.x & kDistance) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const uint32_t low = most[i], high = most[i + kHalf];
    most[i] =
        max_bits(upper ? high : low, __shfl_xor_sync(kAllLanes, upper ? low : high, kDistance));
  }
}

// The amaxes of the tile's columns, of those of each thread.
template <int kRun>
QUAVER_DEVICE void join_columns(const float (&mine)[kVector], WarpMaxima& maxima, uint32_t* amax) {
  uint32_t most[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) most[i] = min_bits(magnitude_bits(mine[i]), 0x7fc00000u);
  join_columns<kVector / 2, kChunks>(most);
  join_columns<kVector / 4, 2 * kChunks>(most);
  const int upper = (threadIdx.x & kChunks) != 0, second = (threadIdx.x & 2 * kChunks) != 0;
  const int col = column<kRun>(threadIdx.x % kChunks, 8 * upper + 4 * second);
  store_words<4>(&maxima.of[threadIdx.x / kWarp][swizzled(col)], most);
  __syncthreads();
  if (threadIdx.x >= kTile) return;
  uint32_t all = 0;
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) all = max_bits(all, maxima.of[w][threadIdx.x]);
  amax[threadIdx.x] = all;
}

// The amax of each row and, if `columns`, of each column of the tile, in shared memory.
// get_values(values, pass, v) gives a thread's.
template <int kRun, class Values>
QUAVER_DEVICE void measure(Amaxes& amax, WarpMaxima& maxima, const Values& values, bool columns) {
  float most[kVector] = {};
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    float v[kVector];
    get_values(values, pass, v);
    const TilePlace at = place_in_pass(pass, threadIdx.x);
    const uint32_t row = group_max(amax_bits(v), kChunks);
    if (at.chunk == 0) amax.row[at.row] = row;
    if (!columns) continue;
#pragma unroll
    for (int i = 0; i < kVector; ++i) most[i] = larger(most[i], v[i]);
  }
  if (columns) join_columns<kRun>(most, maxima, amax.col);
  __syncthreads();
}

// Codes of format Q, or of the one that the targets name where Q is void.
template <class Q>
QUAVER_DEVICE void encode_codes(const Targets& to, float (&v)[kVector], Packed<1>& codes) {
  if constexpr (!std::is_void_v<Q>)
    encode_vector<Q>(v, codes);
  else if (to.type == DType::e4m3)
    encode_vector<e4m3>(v, codes);
  else
    encode_vector<e5m2>(v, codes);
}

// Codes of the tile by a scale for each row, to q and, for qt, to `tile`.
template <int kRun, class Q, class Values>
QUAVER_DEVICE void encode_rows(const Targets& to, const Values& values, const float* scale,
                               int64_t row0, int64_t col0, Tile* tile) {
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const TilePlace at = place_in_pass(pass, threadIdx.x);
    const int64_t row = row0 + at.row, col = col0 + first_column<kRun>(at);
    float v[kVector];
    get_values(values, pass, v);
    divide(v, divisor(scale[at.row]));
    Packed<1> codes;
    encode_codes<Q>(to, v, codes);
    const int64_t n = row < to.padded.rows ? to.padded.cols - col : 0;
    if (to.q.codes != nullptr)
      store_runs<kRun>(to.q.codes + row * to.padded.cols + col, codes, kRunsApart<kRun>, n,
                       to.q.aligned);
    if (tile != nullptr) put_codes<kRun>(*tile, at, codes);
  }
}

// Codes by a scale for each column, or by one, into shared memory.
template <int kRun, class Q, class Values>
QUAVER_DEVICE void encode_columns(const Targets& to, const Values& values,
                                  const ColumnScales& scale, bool one, Tile& tile) {
  uint32_t of_column[kVector];
  if (!one) {
#pragma unroll
    for (int i = 0; i < kVector; i += 4)
      load_words<4>(scale.of + swizzled(column<kRun>(threadIdx.x % kChunks, i)), of_column + i);
  }
  const Divisor by = divisor(scale.of[0]);
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const TilePlace at = place_in_pass(pass, threadIdx.x);
    float v[kVector];
    get_values(values, pass, v);
    if (one) {
      divide(v, by);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] = v[i] / bit_cast<float>(of_column[i]);
    }
    Packed<1> codes;
    encode_codes<Q>(to, v, codes);
    put_codes<kRun>(tile, at, codes);
  }
}

// Chooses and writes the scales of a layout's 1 x 128 blocks in the tile whose first row there is
// `row0` and whose column of scales is `place`. The row of a thread is at `at` in shared memory.
QUAVER_DEVICE void choose_blocks(const Targets& to, const Target& layout, const uint32_t* amax,
                                 float* scale, int at, int64_t row0, int64_t rows, int64_t place) {
  if (threadIdx.x >= kTile) return;
  const uint32_t most = amax[at];
  scale[at] = choose(to, most);
  const int64_t row = row0 + threadIdx.x;
  if (layout.scale != nullptr && row < rows)
    layout.scale[row * layout.per_row + place] = written(scale[at], most);
}

// Chooses the scale of the tile that is `across` and `down` in qt, where qt has tiles.
QUAVER_DEVICE void choose_tile(const Targets& to, const Amaxes& amax, float* scale, int64_t down,
                               int64_t across) {
  uint32_t most = 0;  // of all rows, in every warp
#pragma unroll
  for (int r = 0; r < kTile; r += kWarp) most = max_bits(most, amax.row[r + threadIdx.x % kWarp]);
  most = __reduce_max_sync(kAllLanes, most);
  if (threadIdx.x != 0) return;
  scale[0] = choose(to, most);
  if (to.qt.scale != nullptr) to.qt.scale[down * to.qt.per_row + across] = written(scale[0], most);
}

// How the rows of qt lie. A group's lie between those of others (cast_groups.cu).
struct Columns {
  int64_t count, width;
};

QUAVER_DEVICE Columns columns_of(const Targets& to) { return {to.padded.rows, to.padded.rows}; }

// Writes qt's codes of the tile, on which the block has synchronised.
template <class To>
QUAVER_DEVICE void store_columns(const To& to, const Tile& tile, int64_t row0, int64_t col0) {
  const Columns columns = columns_of(to);
  const Tiles own = {columns.count, to.padded.cols, to.padded.across};
  store_transposed(to.qt.codes, columns.width, tile, own, row0, col0, threadIdx.x, to.qt.aligned);
}

// Casts a tile whose scales are in shared memory; `one`: a single one of all columns.
template <int kRun, class Q, class To, class Values>
QUAVER_DEVICE void encode_both(const To& to, const Values& values, int64_t row0, int64_t col0,
                               bool one, BlocksMemory& memory) {
  if (to.q.codes != nullptr)
    encode_rows<kRun, Q>(to, values, memory.row_scale, row0, col0, nullptr);
  if (to.qt.codes == nullptr) return;
  encode_columns<kRun, Q>(to, values, memory.col_scale, one, memory.tile);
  __syncthreads();
  store_columns(to, memory.tile, row0, col0);
}

// Chooses and writes the scales of a tile, `down` and `along` in the matrix, in blocks: q's of
// 1 x 128, and qt's or its tile's.
template <int kRun, class Values>
QUAVER_DEVICE void choose_scales(const Targets& to, const Values& values, int64_t down,
                                 int64_t along, BlocksMemory& memory) {
  const int64_t row0 = down * kTile, col0 = along * kTile;
  const bool columns = !to.tiles_t && to.qt.codes != nullptr;
  measure<kRun>(memory.amax, maxima_in(memory.tile), values, columns);
  const int row = threadIdx.x, col = swizzled(threadIdx.x);
  choose_blocks(to, to.q, memory.amax.row, memory.row_scale, row, row0, to.padded.rows, along);
  if (to.tiles_t)
    choose_tile(to, memory.amax, memory.col_scale.of, along, down);
  else if (columns)
    choose_blocks(to, to.qt, memory.amax.col, memory.col_scale.of, col, col0, to.padded.cols, down);
  __syncthreads();
}

// Casts a tile in blocks. Between two calls a block synchronises.
template <int kRun, class Q, class Values>
QUAVER_DEVICE void cast_blocks(const Targets& to, const Values& values, int64_t down, int64_t along,
                               BlocksMemory& memory) {
  choose_scales<kRun>(to, values, down, along, memory);
  encode_both<kRun, Q>(to, values, down * kTile, along * kTile, to.tiles_t, memory);
}

}  // namespace quaver::cuda
