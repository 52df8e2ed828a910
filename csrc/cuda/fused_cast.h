// Device functions that normalize and activate share: they cast a tile to both padded layouts, save
// groups from registers, and decode saved groups (quaver/cast.h).
#pragma once

#include "quaver/activation.h"
#include "quaver/cast.h"
#include "runtime_type.h"
#include "tensor_scale.h"
#include "transpose_tile.h"

namespace quaver::cuda {

// A GemmCast as kernels take it. The layouts are padded, so that every vector is whole.
struct DeviceCast {
  uint8_t *q, *qt;
  TensorScale scale;
  DType type;
  bool aligned;
  int64_t pitch;  // from row to row of q
};

inline DeviceCast device_cast(const char* op, const GemmCast& c) {
  return {c.q.as<uint8_t>(),
          c.qt.as<uint8_t>(),
          tensor_scale(op, c.q.dtype, c.scale, c.amax, c.power_of_two, c.source),
          c.q.dtype,
          is_aligned(c.q.data) && is_aligned(c.qt.data),
          c.q.cols};
}

// The values and the padded layouts of a matrix in tiles.
struct Matrix {
  int64_t rows, cols;
  Tiles padded;
};

inline Matrix make_matrix(int64_t rows, int64_t cols) {
  return {rows, cols, make_tiles(gemm_padded(rows), gemm_padded(cols))};
}

inline int64_t matrix_tiles(const Matrix& m) { return std::max<int64_t>(1, tile_count(m.padded)); }

// Up to kVector values of one row that a thread has in one pass over a tile.
template <int kRun>
struct Fragment {
  TilePlace at;
  int64_t row, col;
  int64_t n, padded;  // from `col` on to the row's end: values, and with padding; may be negative
};

// The first row and column of a tile.
struct Corner {
  int64_t row, col;
};

QUAVER_DEVICE Corner corner_of(const Matrix& m, int64_t tile) {
  return {tile / m.padded.across * kTile, tile % m.padded.across * kTile};
}

// That of the block's tile, in a grid with a block for each. A quotient of 64 bits would be a call,
// around which a kernel of many registers spills some.
QUAVER_DEVICE Corner corner_of_block(const Matrix& m) {
  const auto across = static_cast<uint32_t>(m.padded.across);
  return {int64_t(blockIdx.x / across) * kTile, int64_t(blockIdx.x % across) * kTile};
}

template <int kRun>
QUAVER_DEVICE Fragment<kRun> fragment_in_pass(const Matrix& m, Corner tile, int pass) {
  Fragment<kRun> p;
  p.at = place_in_pass(pass, threadIdx.x);
  p.row = tile.row + p.at.row;
  p.col = tile.col + first_column<kRun>(p.at);
  p.n = p.row < m.rows ? m.cols - p.col : 0;
  p.padded = p.row < m.padded.rows ? m.padded.cols - p.col : 0;
  return p;
}

// Fast paths are compiled for tiles that have no edge, and for aligned casts by powers of two, so
// that a pass is one run of instructions: each branch would decode the values again.
QUAVER_DEVICE bool is_inside(const Matrix& m, Corner tile) {
  return tile.row + kTile <= m.rows && tile.col + kTile <= m.cols;
}

template <int kRun>
QUAVER_DEVICE Fragment<kRun> as_inside(Fragment<kRun> p) {
  p.n = p.padded = kTile;
  return p;
}

template <DType type>
QUAVER_DEVICE DeviceCast as_aligned(DeviceCast c) {
  c.type = type;
  c.aligned = true;
  return c;
}

QUAVER_DEVICE Divisor as_multiplication(Divisor d) { return {d.factor, false, true}; }

// Encodes values in place of one pass, of which `seen` are the amax's bits: to q, and to the tile
// for qt.
template <int kRun>
QUAVER_DEVICE void put_values(const DeviceCast& c, Tile& tile, const Fragment<kRun>& p,
                              float (&x)[kVector], uint32_t seen, Divisor by) {
  const bool numbers = is_number(seen) && by.sound;
  divide(x, by);
  Packed<1> codes;
  if (c.type == DType::e4m3)
    encode_vector<e4m3>(x, codes, numbers);
  else
    encode_vector<e5m2>(x, codes, numbers);
  store_runs<kRun>(c.q + p.row * c.pitch + p.col, codes, kRunsApart<kRun>, p.padded, c.aligned);
  put_codes<kRun>(tile, p.at, codes);
}

// The block must have synchronised after its put_values.
QUAVER_DEVICE void store_qt(const DeviceCast& c, const Tile& tile, const Matrix& m, Corner corner) {
  store_transposed(c.qt, tile, m.padded, corner.row, corner.col, threadIdx.x, c.aligned);
}

// Saved groups, to be written or read.
struct DeviceGroups {
  uint8_t* codes;  // null: none
  uint8_t* scale;
  int64_t cols, per_row, block;
  int shift;  // of a block that is a power of two, else -1
  bool held;  // a group is between neighbouring threads
  bool aligned;
};

// Groups of up to kVector times `most` elements, of a power of two, can be saved by the kernel that
// has the values in registers of so many threads.
inline DeviceGroups device_groups(const GroupedView& g, int most) {
  DeviceGroups d = {};
  if (g.codes.data == nullptr) return d;
  QUAVER_CHECK(g.codes.cols >> 32 == 0, "saved groups: a row must have less than 2^32 values, got ",
               g.codes.cols);
  d.codes = g.codes.as<uint8_t>();
  d.scale = g.scale;
  d.cols = g.codes.cols;
  d.per_row = blocks_in_row(d.cols, g.layout.block);
  d.block = g.layout.block;
  d.shift = -1;
  for (int s = 0; s < 40; ++s)
    if (int64_t(1) << s == g.layout.block) d.shift = s;
  d.held = d.shift >= 4 && g.layout.block <= int64_t(most) * kVector;
  d.aligned = d.cols % kVector == 0 && is_aligned(d.codes);
  return d;
}

// Groups of a fast path: a tile wide, so that a row of it is one.
inline bool are_tile_wide(const DeviceGroups& g) {
  return g.codes != nullptr && g.block == kTile && g.aligned;
}

QUAVER_DEVICE DeviceGroups as_tile_wide(DeviceGroups g) {
  g.block = kTile;
  g.shift = 7;
  g.held = g.aligned = true;
  return g;
}

QUAVER_DEVICE int64_t group_of(const DeviceGroups& g, int64_t col) {
  if (g.shift >= 0) return col >> g.shift;
  return static_cast<uint32_t>(col) / static_cast<uint32_t>(g.block);  // 64 bits would be a call
}

// The amax of each run's group, which is a part of runs of all threads, one whole run of several
// threads, or lies in several runs. All lanes of the warp call it.
template <int kRun>
QUAVER_DEVICE void group_amaxes(int64_t block, int apart, const float (&x)[kVector],
                                uint32_t (&seen)[kVector / kRun]) {
  constexpr int kRuns = kVector / kRun;
  const bool one = block >= int64_t(kRuns) * apart;
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    float run[kRun];
#pragma unroll
    for (int k = 0; k < kRun; ++k) run[k] = x[r * kRun + k];
    seen[r] = amax_bits(run);
  }
#pragma unroll
  for (int d = 1; d < kRuns; d *= 2) {
    if (block <= d * apart) break;
    uint32_t joint[kRuns];
#pragma unroll
    for (int r = 0; r < kRuns; ++r) joint[r] = max_bits(seen[r], seen[r ^ d]);
#pragma unroll
    for (int r = 0; r < kRuns; ++r) seen[r] = joint[r];
  }
  const int threads = int(block < apart ? block : apart) / kRun;
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    if (r > 0 && one) {
      seen[r] = seen[0];
      continue;
    }
    for (int distance = threads / 2; distance > 0; distance /= 2)
      seen[r] = max_bits(seen[r], __shfl_xor_sync(kAllLanes, seen[r], distance));
  }
}

// Saves values from `col` on, runs of kRun that begin `apart` elements from each other; zeros are
// behind n. All lanes of the warp call it, and those that hold one group are neighbours. kNumbers:
// none is NaN. Returns the groups' largest magnitude.
template <int kRun, bool kNumbers = false>
QUAVER_DEVICE uint32_t save_vector(const DeviceGroups& g, int64_t row, int64_t col, int apart,
                                   int64_t n, const float (&x)[kVector]) {
  constexpr int kRuns = kVector / kRun;
  uint32_t seen[kRuns], code[kRuns], most = 0;
  group_amaxes<kRun>(g.block, apart, x, seen);
#pragma unroll
  for (int r = 0; r < kRuns; ++r) most = max_bits(most, seen[r]);
  if (n <= 0) return most;
  float scaled[kVector];
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    code[r] = block_exponent(seen[r]);
    const float inverse = block_inverse(code[r]);
#pragma unroll
    for (int k = 0; k < kRun; ++k) scaled[r * kRun + k] = x[r * kRun + k] * inverse;
  }
  Packed<1> codes;
  encode_vector<e4m3>(scaled, codes, kNumbers || is_number(most));
  store_runs<kRun>(g.codes + row * g.cols + col, codes, apart, n, g.aligned);
  // Only the first run can begin a group that all runs are in.
  const bool one = g.block >= int64_t(kRuns) * apart;
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const int64_t at = col + r * apart;
    if ((r == 0 || !one) && r * apart < n && (at & (g.block - 1)) == 0)
      g.scale[row * g.per_row + group_of(g, at)] = static_cast<uint8_t>(code[r]);
  }
  return most;
}

// Saved values, decoded, zeros behind them. kOneGroup: they are whole, and of one group.
template <int kRun, bool kOneGroup = false>
QUAVER_DEVICE void load_vector(const DeviceGroups& g, int64_t row, int64_t col, int apart,
                               int64_t n, float (&x)[kVector]) {
  decode_vector<e4m3>(load_runs<kRun>(g.codes + row * g.cols + col, apart, n, g.aligned), x);
  if (kOneGroup) {
    const float s = decode_e8m0(g.scale[row * g.per_row + group_of(g, col)]);
#pragma unroll
    for (int k = 0; k < kVector; ++k) x[k] *= s;
    return;
  }
  if (n <= 0) return;
  const uint8_t* scale = g.scale + row * g.per_row;
#pragma unroll
  for (int r = 0; r < kVector / kRun; ++r) {
    if (r * apart >= n) continue;
    int64_t group = group_of(g, col + r * apart);
    int64_t end = (group + 1) * g.block - col - r * apart;  // of the group, in the run
    float s = decode_e8m0(scale[group]);
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      if (g.shift < 4 && k == end) {
        end += g.block;
        if (r * apart + k < n) s = decode_e8m0(scale[++group]);
      }
      x[r * kRun + k] *= s;
    }
  }
  mask_runs<kRun>(x, apart, n);  // a scale may be NaN
}

// An optional [C] argument.
struct DeviceChannels {
  const void* data;  // null: none
  DType type;
  bool aligned;
};

inline DeviceChannels device_channels(const TensorView& v) {
  return {v.data, v.dtype, is_aligned(v.data)};
}

// Its values from `col` on, four at a time.
template <int kRun>
QUAVER_DEVICE void load_channels(const DeviceChannels& c, int64_t col, int apart, int64_t n,
                                 float (&x)[kVector]) {
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    const int64_t at = place_in_runs<kRun>(quad * kQuad, apart);
    float four[kQuad];
    decode_any(c.type, load_quad(c.data, c.type, col + at, n - at, c.aligned), 0, 1.0f, four);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) x[quad * kQuad + k] = four[k];
  }
}

// Calls body(kind) with the kind as a constant.
template <class Body>
void with_kind(Activation kind, Body body) {
  if (kind == Activation::silu) return body(std::integral_constant<Activation, Activation::silu>{});
  if (kind == Activation::gelu) return body(std::integral_constant<Activation, Activation::gelu>{});
  body(std::integral_constant<Activation, Activation::gelu_tanh>{});
}

// That, for a thread's values, in a kernel that serves every kind: kernels whose values stay in
// registers are long, and take minutes to compile.
template <class Body>
QUAVER_DEVICE void with_kind_of_all(Activation kind, Body body) {
  if (kind == Activation::silu)
    body(std::integral_constant<Activation, Activation::silu>{});
  else if (kind == Activation::gelu)
    body(std::integral_constant<Activation, Activation::gelu>{});
  else
    body(std::integral_constant<Activation, Activation::gelu_tanh>{});
}

// Saves the groups that no other kernel has in registers.
void save_groups(const char* op, const GroupedView& to, const RowsView& x, void* stream);

}  // namespace quaver::cuda
