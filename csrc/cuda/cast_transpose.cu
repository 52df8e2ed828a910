// The kernel that casts a matrix to both GEMM layouts from one read: q [rows, cols] and
// qt [cols, rows] in FP8, and the amax. A block casts a tile, stores its rows directly and its
// columns through shared memory.
#include "../arguments.h"
#include "dispatch.h"
#include "tensor_scale.h"
#include "transpose_tile.h"

namespace quaver::cuda {
namespace {

template <class X, class Q>
__global__ void __launch_bounds__(kThreads)
    cast_transpose_kernel(Q* q, Q* qt, const X* x, Tiles tiles, TensorScale s, bool aligned,
                          bool aligned_t, bool first) {
  __shared__ Tile tile;
  const CastPass of = cast_pass(s, first);
  if (!of.encode && !of.collect) return;
  const Divisor by = divisor(of.scale);
  const int64_t row0 = int64_t(blockIdx.x) / tiles.across * kTile;
  const int64_t col0 = int64_t(blockIdx.x) % tiles.across * kTile;

  Packed<sizeof(X)> loaded[kPasses];  // all loads before the first use
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const TilePlace at = place_in_pass(pass, threadIdx.x);
    const int64_t row = row0 + at.row, col = col0 + at.chunk * kVector;
    const int64_t n = row < tiles.rows ? tiles.cols - col : 0;
    loaded[pass] = load<sizeof(X)>(x + row * tiles.cols + col, sizeof(X), n, aligned);
  }
  uint32_t seen = 0;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const TilePlace at = place_in_pass(pass, threadIdx.x);
    const int64_t row = row0 + at.row, col = col0 + at.chunk * kVector;
    const int64_t n = row < tiles.rows ? tiles.cols - col : 0;
    float v[kVector];
    decode_vector<X>(loaded[pass], v);
    seen = max_bits(seen, amax_bits(v));
    if (!of.encode) continue;
    divide(v, by);
    Packed<1> codes;
    encode_vector<Q>(v, codes);
    store(q + row * tiles.cols + col, codes, 1, n, aligned);
    put_codes(tile, at, codes);
  }
  __syncthreads();
  if (of.encode)
    store_transposed(reinterpret_cast<uint8_t*>(qt), tile, tiles, row0, col0, threadIdx.x,
                     aligned_t);
  if (of.collect) block_atomic_max(s.amax, seen);
}

}  // namespace

void cast_transpose(const TensorView& q, const TensorView& qt, const TensorView& scale,
                    const TensorView& amax, const TensorView& x, bool power_of_two,
                    const ScaleSource& source, void* stream) {
  const char* op = "cast_transpose";
  check_cast_transpose(q, qt, x, source);
  const TensorScale s = tensor_scale(q.dtype, scale, amax, power_of_two, source);
  const Tiles tiles = make_tiles(x.rows, x.cols);
  const bool aligned = x.cols % kVector == 0 && is_aligned(x.data) && is_aligned(q.data);
  const bool aligned_t = x.rows % kVector == 0 && is_aligned(qt.data);
  with_float(x.dtype, [&](auto from) {
    with_code(q.dtype, [&](auto to) {
      using X = decltype(from);
      using Q = decltype(to);
      if constexpr (sizeof(Q) == 1)
        cast_in_passes(op, s, stream, [&](bool first) {
          launch(op, cast_transpose_kernel<X, Q>, std::max<int64_t>(1, tile_count(tiles)), kThreads,
                 stream, q.as<Q>(), qt.as<Q>(), x.as<const X>(), tiles, s, aligned, aligned_t,
                 first);
        });
    });
  });
}

}  // namespace quaver::cuda
