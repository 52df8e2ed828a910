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
};

inline DeviceCast device_cast(const char* op, const GemmCast& c) {
  return {c.q.as<uint8_t>(), c.qt.as<uint8_t>(),
          tensor_scale(op, c.q.dtype, c.scale, c.amax, c.power_of_two, c.source), c.q.dtype,
          is_aligned(c.q.data) && is_aligned(c.qt.data)};
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
struct Fragment {
  TilePlace at;
  int64_t row, col, n;  // n <= 0: only padding
};

QUAVER_DEVICE Fragment fragment_in_pass(const Matrix& m, int64_t tile, int pass) {
  Fragment p;
  p.at = place_in_pass(pass, threadIdx.x);
  p.row = tile / m.padded.across * kTile + p.at.row;
  p.col = tile % m.padded.across * kTile + p.at.chunk * kVector;
  p.n = p.row < m.rows ? m.cols - p.col : 0;
  return p;
}

// Zeros behind the values: they are the padding, and no part of an amax.
QUAVER_DEVICE void mask(float (&x)[kVector], int64_t n) {
  if (n >= kVector) return;
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = i < n ? x[i] : 0.0f;
}

// Encodes values in place of one pass: to q, and to the tile for qt.
QUAVER_DEVICE void put_values(const DeviceCast& c, Tile& tile, const Matrix& m, const Fragment& p,
                              float (&x)[kVector], Divisor by) {
  divide(x, by);
  Packed<1> codes;
  if (c.type == DType::e4m3)
    encode_vector<e4m3>(x, codes);
  else
    encode_vector<e5m2>(x, codes);
  const int64_t n = p.row < m.padded.rows ? m.padded.cols - p.col : 0;
  store(c.q + p.row * m.padded.cols + p.col, codes, 1, n, c.aligned);
  put_codes(tile, p.at, codes);
}

// The block must have synchronised after its put_values.
QUAVER_DEVICE void store_qt(const DeviceCast& c, const Tile& tile, const Matrix& m, int64_t index) {
  store_transposed(c.qt, tile, m.padded, index / m.padded.across * kTile,
                   index % m.padded.across * kTile, threadIdx.x, c.aligned);
}

// Saved groups, to be written or read.
struct DeviceGroups {
  uint8_t* codes;  // null: none
  uint8_t* scale;
  int64_t cols, per_row, block;
  int shift;    // of a block that is a power of two, else -1
  int threads;  // neighbours that hold one group between them; 0: not in registers
  bool aligned;
};

// Groups of up to `most` neighbouring threads can be saved by the kernel that has the values.
inline DeviceGroups device_groups(const GroupedView& g, int most) {
  DeviceGroups d = {};
  if (g.codes.data == nullptr) return d;
  d.codes = g.codes.as<uint8_t>();
  d.scale = g.scale;
  d.cols = g.codes.cols;
  d.per_row = blocks_in_row(d.cols, g.layout.block);
  d.block = g.layout.block;
  d.shift = -1;
  for (int s = 0; s < 40; ++s)
    if (int64_t(1) << s == g.layout.block) d.shift = s;
  if (d.shift >= 4 && g.layout.block <= int64_t(most) * kVector)
    d.threads = static_cast<int>(g.layout.block / kVector);
  d.aligned = d.cols % kVector == 0 && is_aligned(d.codes);
  return d;
}

QUAVER_DEVICE int64_t group_of(const DeviceGroups& g, int64_t col) {
  return g.shift >= 0 ? col >> g.shift : col / g.block;
}

// Saves n values from `col` on, zeros behind them. All lanes of the warp call it, and those that
// hold one group are neighbours.
QUAVER_DEVICE void save_vector(const DeviceGroups& g, int64_t row, int64_t col, int64_t n,
                               const float (&x)[kVector]) {
  uint32_t seen = amax_bits(x);
  for (int distance = g.threads / 2; distance > 0; distance /= 2)
    seen = max_bits(seen, __shfl_xor_sync(kAllLanes, seen, distance));
  if (n <= 0) return;
  const uint32_t code = block_exponent(seen);
  const float inverse = block_inverse(code);
  float scaled[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) scaled[i] = x[i] * inverse;
  Packed<1> codes;
  encode_vector<e4m3>(scaled, codes);
  store(g.codes + row * g.cols + col, codes, 1, n, g.aligned);
  if ((col & (g.block - 1)) == 0)
    g.scale[row * g.per_row + group_of(g, col)] = static_cast<uint8_t>(code);
}

// Saved values from `col` on, decoded, zeros behind them.
QUAVER_DEVICE void load_vector(const DeviceGroups& g, int64_t row, int64_t col, int64_t n,
                               float (&x)[kVector]) {
  decode_vector<e4m3>(load<1>(g.codes + row * g.cols + col, 1, n, g.aligned), x);
  if (n <= 0) return;
  const uint8_t* scale = g.scale + row * g.per_row;
  if (g.shift >= 4) {
    const float s = decode_e8m0(scale[group_of(g, col)]);
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] *= s;
    mask(x, n);  // a scale may be NaN
    return;
  }
  int64_t group = group_of(g, col), end = (group + 1) * g.block - col;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i == end) {
      ++group;
      end += g.block;
    }
    if (i < n) x[i] *= decode_e8m0(scale[group]);
  }
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

// Its values from `col` on.
QUAVER_DEVICE void load_channels(const DeviceChannels& c, int64_t col, int64_t n,
                                 float (&x)[kVector]) {
  const AnyPacked packed = load_any(c.data, c.type, col, n, c.aligned);
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    float four[kQuad];
    decode_any(c.type, packed, quad, 1.0f, four);
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

// Saves the groups that no other kernel has in registers.
void save_groups(const char* op, const GroupedView& to, const TensorView& x, void* stream);

}  // namespace quaver::cuda
