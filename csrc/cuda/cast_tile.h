// What cast_layouts and the casts of groups share: a tile of a matrix in memory, with scales of
// rows, whose amaxes are gathered before, or with one.
#pragma once

#include "layouts.h"

namespace quaver::cuda {

template <class X>
constexpr int kRunOf = run_length(sizeof(X));

// The tile at (row0, col0) of x [rows, cols], zeros beyond.
template <class X>
QUAVER_DEVICE void load_tile(Packed<sizeof(X)> (&loaded)[kPasses], const X* x, int64_t rows,
                             int64_t cols, int64_t row0, int64_t col0, bool aligned) {
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const TilePlace at = place_in_pass(pass, threadIdx.x);
    const int64_t row = row0 + at.row, col = col0 + first_column<kRunOf<X>>(at);
    const int64_t n = row < rows ? cols - col : 0;
    loaded[pass] = load_runs<kRunOf<X>>(x + row * cols + col, kRunsApart<kRunOf<X>>, n, aligned);
  }
}

// The values of a pass, decoded each time: in f32 they would take twice to four times the
// registers.
template <class X>
struct Decoded {
  const Packed<sizeof(X)> (&loaded)[kPasses];
};

template <class X>
QUAVER_DEVICE void get_values(const Decoded<X>& values, int pass, float (&v)[kVector]) {
  decode_vector<X>(values.loaded[pass], v);
}

template <class X>
QUAVER_DEVICE uint32_t largest_of(const Decoded<X>& values) {
  uint32_t seen = 0;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    float v[kVector];
    get_values(values, pass, v);
    seen = max_bits(seen, amax_bits(v));
  }
  return seen;
}

// The shared memory of a tile with one scale.
struct OneMemory {
  Tile tile;
  float row_scale[kTile];
};

// Casts a tile with one scale.
template <class X, class Q, class To>
QUAVER_DEVICE void cast_by_one(const To& to, const Decoded<X>& values, int64_t row0, int64_t col0,
                               float scale, OneMemory& memory) {
  if (threadIdx.x < kTile) memory.row_scale[threadIdx.x] = scale;
  __syncthreads();
  encode_rows<kRunOf<X>, Q>(to, values, memory.row_scale, row0, col0, &memory.tile);
  if (to.qt.codes == nullptr) return;
  __syncthreads();
  store_columns(to, memory.tile, row0, col0);
}

// Gathers the amaxes of a tile's rows and columns where their scales will be.
template <class X>
QUAVER_DEVICE void gather_amaxes(const Targets& to, const Decoded<X>& values, int64_t row0,
                                 int64_t col0, Amaxes& amax, WarpMaxima& maxima) {
  measure<kRunOf<X>>(amax, maxima, values, to.qt.codes != nullptr);
  if (threadIdx.x >= kTile) return;
  const int64_t row = row0 + threadIdx.x, col = col0 + threadIdx.x;
  if (to.q.scale != nullptr && row < to.padded.rows)
    atomicMax(reinterpret_cast<uint32_t*>(to.q.scale + row), amax.row[threadIdx.x]);
  if (to.qt.scale != nullptr && col < to.padded.cols)
    atomicMax(reinterpret_cast<uint32_t*>(to.qt.scale + col), amax.col[swizzled(threadIdx.x)]);
}

// The scales of a tile's rows and columns, of the amaxes there.
QUAVER_DEVICE void read_scales(const Targets& to, int64_t row0, int64_t col0,
                               BlocksMemory& memory) {
  if (threadIdx.x < kTile) {
    const int64_t row = row0 + threadIdx.x, col = col0 + threadIdx.x;
    const bool has_row = to.q.scale != nullptr && row < to.padded.rows;
    const bool has_col = to.qt.scale != nullptr && col < to.padded.cols;
    memory.row_scale[threadIdx.x] =
        has_row ? choose(to, bit_cast<uint32_t>(to.q.scale[row])) : 1.0f;
    memory.col_scale.of[swizzled(threadIdx.x)] =
        has_col ? choose(to, bit_cast<uint32_t>(to.qt.scale[col])) : 1.0f;
  }
  __syncthreads();
}

// An amax to its scale, in place.
QUAVER_DEVICE void write_scale(const Targets& to, float* place) {
  const uint32_t amax = bit_cast<uint32_t>(*place);
  *place = written(choose(to, amax), amax);
}

}  // namespace quaver::cuda
