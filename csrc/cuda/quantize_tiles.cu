// Casts to e4m3, e5m2 and scaled f16 with one scale for each 128 x 128 tile. A block of threads
// keeps its tile in registers, as it was stored, until the scale is known.
#include "dispatch.h"
#include "quantize_tiles.h"
#include "transpose_tile.h"

namespace quaver::cuda {
namespace {

// n values, of which the first is element i of the tensor: that counts for the random bits.
template <int kRun, class Q>
QUAVER_DEVICE void encode(Packed<sizeof(Q)>& codes, float (&v)[kVector], float scale,
                          bool stochastic, uint64_t seed, int64_t i) {
  if (!stochastic) {
    divide(v, divisor(scale));
    return encode_vector<Q>(v, codes);
  }
  constexpr int per_word = 4 / sizeof(Q);
#pragma unroll
  for (int w = 0; w < kVector / per_word; ++w) {
    codes.word[w] = 0;
#pragma unroll
    for (int k = 0; k < per_word; ++k) {
      const int at = w * per_word + k;
      const uint32_t bits =
          random_bits(seed, static_cast<uint64_t>(i + place_in_runs<kRun>(at, kRunsApart<kRun>)));
      codes.word[w] |= uint32_t(encode_stochastic<Q>(v[at] / scale, bits).bits)
                       << k * (32 / per_word);
    }
  }
}

// What a thread has of its block's tile in one pass.
struct Part {
  int64_t first, n;  // element of the tensor, and how many there are from it on in its row
};

template <int kRun>
QUAVER_DEVICE Part part_in_pass(const Tiles& t, int64_t row0, int64_t col0, int pass) {
  const TilePlace at = place_in_pass(pass, threadIdx.x);
  const int64_t row = row0 + at.row, col = col0 + first_column<kRun>(at);
  return {row * t.cols + col, row < t.rows ? t.cols - col : 0};
}

template <class X, class Q>
__global__ void __launch_bounds__(kThreads, 1)
    quantize_tiles_kernel(Q* q, const X* x, float* scales, float* amaxes, Tiles tiles,
                          float finite_max, bool power_of_two, bool given, bool stochastic,
                          uint64_t seed, bool aligned) {
  constexpr int kRun = run_length(std::max(sizeof(X), sizeof(Q))), kApart = kRunsApart<kRun>;
  __shared__ uint32_t most;
  const auto across = static_cast<uint32_t>(tiles.across);  // a grid has less than 2^31 blocks
  const int64_t row0 = int64_t(blockIdx.x / across) * kTile;
  const int64_t col0 = int64_t(blockIdx.x % across) * kTile;
  uint32_t seen = 0;
  Packed<sizeof(X)> kept[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const Part at = part_in_pass<kRun>(tiles, row0, col0, pass);
    kept[pass] = load_runs<kRun>(x + at.first, kApart, at.n, aligned);
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    float v[kVector];
    decode_vector<X>(kept[pass], v);
    seen = max_bits(seen, amax_bits(v));
  }
  seen = block_max(seen);
  if (threadIdx.x == 0) most = seen;
  __syncthreads();
  const float amax = bit_cast<float>(most);
  const float scale = given ? scales[blockIdx.x] : scale_from_amax(amax, finite_max, power_of_two);
  if (threadIdx.x == 0) {
    amaxes[blockIdx.x] = amax;
    if (!given) scales[blockIdx.x] = scale;
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const Part at = part_in_pass<kRun>(tiles, row0, col0, pass);
    float v[kVector];
    decode_vector<X>(kept[pass], v);
    Packed<sizeof(Q)> codes;
    encode<kRun, Q>(codes, v, scale, stochastic, seed, at.first);
    store_runs<kRun>(q + at.first, codes, kApart, at.n, aligned);
  }
}

}  // namespace

void quantize_tiles(const TensorView& q, const TensorView& scale, const TensorView& amax,
                    const TensorView& x, const QuantizeOptions& o, bool given, void* stream) {
  if (x.numel() == 0) return;
  const Tiles tiles = make_tiles(x.rows, x.cols);
  const bool aligned = x.cols % kVector == 0 && is_aligned(x.data) && is_aligned(q.data);
  with_float(x.dtype, [&](auto from) {
    with_code(q.dtype, [&](auto to) {
      using X = decltype(from);
      using Q = decltype(to);
      launch("quantize", quantize_tiles_kernel<X, Q>, tile_count(tiles), kThreads, stream,
             q.as<Q>(), x.as<const X>(), scale.as<float>(), amax.as<float>(), tiles,
             scale_max(q.dtype), o.power_of_two, given, o.stochastic, o.seed, aligned);
    });
  });
}

}  // namespace quaver::cuda
