// Casts to e4m3, e5m2 and scaled f16, with one scale for the tensor, each row, or each 1 x B block
// (tiles: quantize_tiles.cu).
// x is read once (twice where a tensor's scale is chosen just in time) and q is written once.
#include "../arguments.h"
#include "dispatch.h"
#include "quantize_tiles.h"
#include "tensor_scale.h"

namespace quaver::cuda {
namespace {

template <class X, class Q>
constexpr int kRun = run_length(std::max(sizeof(X), sizeof(Q)));

// Element i of the tensor takes the random bits of (seed, i), as on the CPU.
template <int kRun, class Q, int kSize>
QUAVER_DEVICE void encode_random(const float (&x)[kVector], Packed<kSize>& v, uint64_t seed,
                                 uint64_t first, int64_t apart) {
  constexpr int per_word = 4 / sizeof(Q);
#pragma unroll
  for (int w = 0; w < 4 * kSize; ++w) v.word[w] = 0;
#pragma unroll
  for (int i = 0; i < kVector; i += 4) {
    const int64_t at = place_in_runs<kRun>(i, apart);
    Philox4 random;
    if ((first + at) % 4 == 0) {
      random = philox4x32(seed, (first + at) / 4);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) random.word[k] = random_bits(seed, first + at + k);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t code = encode_stochastic<Q>(x[i + k], random.word[k]).bits;
      v.word[(i + k) / per_word] |= code << (i + k) % per_word * (32 / per_word);
    }
  }
}

// Casts values of which `seen` are the amax's bits.
template <int kRun, class Q, bool kStochastic>
QUAVER_DEVICE void cast(Q* q, int64_t i, int64_t apart, int64_t n, bool aligned,
                        float (&x)[kVector], uint32_t seen, float scale, Divisor by,
                        uint64_t seed) {
  Packed<sizeof(Q)> codes;
  if (kStochastic) {
    divide(x, {scale, true, false});
    encode_random<kRun, Q>(x, codes, seed, static_cast<uint64_t>(i), apart);
  } else {
    divide(x, by);
    encode_vector<Q>(x, codes, is_number(seen) && by.sound);
  }
  store_runs<kRun>(q + i, codes, apart, n, aligned);
}

template <class X, class Q, bool kStochastic>
__global__ void __launch_bounds__(kThreads)
    quantize_tensor_kernel(Q* q, const X* x, int64_t n, TensorScale s, uint64_t seed, bool aligned,
                           bool first) {
  __shared__ CastPass shared;
  cast_pass(s, first, blockIdx.x, shared);
  const CastPass pass = shared;
  if (!pass.encode && !pass.collect) return;
  if (!pass.encode) return leave_amax(s, blockIdx.x, look(x, n, blockIdx.x, gridDim.x, aligned));
  constexpr int kApart = kThreads * kRun<X, Q>;
  uint32_t most = 0;
  const int64_t step = int64_t(gridDim.x) * kBlockSpan;
  for (int64_t i = blockIdx.x * kBlockSpan + threadIdx.x * kRun<X, Q>; i < n; i += step) {
    float v[kVector];
    decode_vector<X>(load_runs<kRun<X, Q>>(x + i, kApart, n - i, aligned), v);
    const uint32_t seen = amax_bits(v);
    most = max_bits(most, seen);
    cast<kRun<X, Q>, Q, kStochastic>(q, i, kApart, n - i, aligned, v, seen, pass.scale, pass.by,
                                     seed);
  }
  if (pass.collect) leave_amax(s, blockIdx.x, most);
}

template <class X, class Q, bool kStochastic>
__global__ void __launch_bounds__(kThreads)
    quantize_groups_kernel(Q* q, const X* x, float* scales, float* amaxes, ScaleSets sets,
                           float finite_max, bool power_of_two, bool given, uint64_t seed,
                           bool aligned) {
  const Span span = span_of(sets, blockIdx.x, threadIdx.x);
  const int thread = threadIdx.x % sets.threads;
  const int64_t step = int64_t(sets.threads) * kVector;
  constexpr int kLength = kRun<X, Q>;
  const int64_t apart = sets.threads * kLength;
  float v[kVector];
  uint32_t seen = 0;
  for (int64_t i = thread * kLength; i < span.n; i += step) {
    decode_vector<X>(load_runs<kLength>(x + span.first + i, apart, span.n - i, aligned), v);
    seen = max_bits(seen, amax_bits(v));
  }
  seen = group_max(seen, sets.threads);
  const float amax = bit_cast<float>(seen);
  if (span.group >= sets.count) return;
  const float scale = given ? scales[span.group] : scale_from_amax(amax, finite_max, power_of_two);
  if (thread == 0) {
    amaxes[span.group] = amax;
    if (!given) scales[span.group] = scale;
  }
  for (int64_t i = thread * kLength; i < span.n; i += step) {
    if (span.n > step)  // otherwise v still holds the thread's only vector
      decode_vector<X>(load_runs<kLength>(x + span.first + i, apart, span.n - i, aligned), v);
    cast<kLength, Q, kStochastic>(q, span.first + i, apart, span.n - i, aligned, v, seen, scale,
                                  divisor(scale), seed);
  }
}

template <class X, class Q, bool kStochastic>
void run(const TensorView& q, const TensorView& scale, const TensorView& amax, const TensorView& x,
         const QuantizeOptions& o, const ScaleSource& source, void* stream) {
  const char* op = "quantize";
  if (o.layout.grain == Grain::tensor) {
    TensorScale s =
        tensor_scale(op, q.dtype, scale.as<float>(), amax.as<float>(), o.power_of_two, source);
    const int64_t most = loop_blocks(op, x.numel());
    cast_in_passes(op, &s, {most, most}, stream, [&](bool first, int64_t blocks) {
      launch(op, quantize_tensor_kernel<X, Q, kStochastic>, blocks, kThreads, stream, q.as<Q>(),
             x.as<const X>(), x.numel(), s, o.seed, is_aligned(x.data) && is_aligned(q.data),
             first);
    });
    return;
  }
  const ScaleSets sets = make_scale_sets(x, o.layout);
  if (sets.count == 0) return;
  launch(op, quantize_groups_kernel<X, Q, kStochastic>, scale_set_blocks(sets), kThreads, stream,
         q.as<Q>(), x.as<const X>(), scale.as<float>(), amax.as<float>(), sets, scale_max(q.dtype),
         o.power_of_two, source.given, o.seed, are_aligned(sets, x.data, q.data));
}

}  // namespace

void quantize(const TensorView& q, const TensorView& scale, const TensorView& amax,
              const TensorView& x, const QuantizeOptions& o, const ScaleSource& source,
              void* stream) {
  check_quantize(q, scale, amax, x, o, source);
  if (o.layout.grain == Grain::tile)
    return quantize_tiles(q, scale, amax, x, o, source.given, stream);
  with_float(x.dtype, [&](auto from) {
    with_code(q.dtype, [&](auto to) {
      using X = decltype(from);
      using Q = decltype(to);
      (o.stochastic ? run<X, Q, true> : run<X, Q, false>)(q, scale, amax, x, o, source, stream);
    });
  });
}

}  // namespace quaver::cuda
