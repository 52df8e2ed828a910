// NF4 codes to and from values. A block of threads takes 4096 flat elements, 16 a thread, which are
// whole blocks of codes of every size.
#include "../check_nf4.h"
#include "dispatch.h"

namespace quaver::cuda {
namespace {

static_assert(kNf4MaxBlock == kBlockSpan, "a block of threads has whole blocks of codes");
static_assert(kNf4MinBlock % kVector == 0, "a thread's elements share an absmax");

struct Problem {
  void* values;
  Nf4View codes;
  bool aligned, codes_aligned;
};

// Values and codes lie in runs of the values' type.
template <class X>
constexpr int kRun = run_length(sizeof(X));
template <class X>
constexpr int kRuns = kVector / kRun<X>;
template <class X>
constexpr int kApart = kThreads * kRun<X>;

template <class X>
QUAVER_DEVICE int64_t first_of_thread() {
  return int64_t(blockIdx.x) * kBlockSpan + threadIdx.x * kRun<X>;
}

// The codes of a run as they lie in memory: one access of 4 bytes, or 2.
template <int kRun>
using Word = std::conditional_t<kRun == 8, uint32_t, uint16_t>;

template <int kRun>
QUAVER_DEVICE uint32_t load_codes(const uint8_t* from, int64_t n, bool aligned) {
  if (aligned && n >= kRun) return *reinterpret_cast<const Word<kRun>*>(from);
  uint32_t codes = 0;
#pragma unroll
  for (int b = 0; b < kRun / 2; ++b)
    if (2 * b < n) codes |= uint32_t(from[b]) << 8 * b;
  return codes;
}

template <int kRun>
QUAVER_DEVICE void store_codes(uint8_t* to, uint32_t codes, int64_t n, bool aligned) {
  if (aligned && n >= kRun) {
    *reinterpret_cast<Word<kRun>*>(to) = static_cast<Word<kRun>>(codes);
    return;
  }
#pragma unroll
  for (int b = 0; b < kRun / 2; ++b)
    if (2 * b < n) to[b] = static_cast<uint8_t>(codes >> 8 * b);
}

// The place of element j's code in its run: the even element's is in the high bits of its byte.
QUAVER_DEVICE int shift_of(int j) { return j / 2 * 8 + (j % 2 == 0 ? 4 : 0); }

template <class X>
__global__ void __launch_bounds__(kThreads) encode_kernel(Problem p) {
  __shared__ uint32_t most[kBlockSpan / kNf4MinBlock];
  const unsigned block = unsigned(p.codes.block);
  const int64_t i = first_of_thread<X>(), n = p.codes.numel - i;
  if (threadIdx.x < kBlockSpan / kNf4MinBlock) most[threadIdx.x] = 0;
  __syncthreads();
  float x[kVector];
  decode_vector<X>(load_runs<kRun<X>>(static_cast<const X*>(p.values) + i, kApart<X>, n, p.aligned),
                   x);
  unsigned place[kRuns<X>];  // of a run's block in the thread's
#pragma unroll
  for (int r = 0; r < kRuns<X>; ++r) {
    float run[kRun<X>];
#pragma unroll
    for (int k = 0; k < kRun<X>; ++k) run[k] = x[r * kRun<X> + k];
    place[r] = (r * kApart<X> + threadIdx.x * kRun<X>) / block;
    atomicMax(&most[place[r]], amax_bits(run));
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRuns<X>; ++r) {
    const int64_t at = i + r * kApart<X>, left = n - r * kApart<X>;
    if (left <= 0) continue;
    const float absmax = nf4_absmax(most[place[r]]), inverse = nf4_inverse(absmax);
    if (at % block == 0) p.codes.absmax[at / block] = absmax;
    uint32_t codes = 0;
#pragma unroll
    for (int k = 0; k < kRun<X>; ++k) {
      const uint32_t code = k < left ? nf4_code(x[r * kRun<X> + k] * inverse) : kNf4Zero;
      codes |= code << shift_of(k);
    }
    store_codes<kRun<X>>(p.codes.codes + at / 2, codes, left, p.codes_aligned);
  }
}

template <class X>
__global__ void __launch_bounds__(kThreads) decode_kernel(Problem p) {
  __shared__ float level[kNf4Levels];
  if (threadIdx.x < kNf4Levels) level[threadIdx.x] = nf4_level(threadIdx.x);
  __syncthreads();
  const int64_t i = first_of_thread<X>(), n = p.codes.numel - i;
  float x[kVector] = {};
#pragma unroll
  for (int r = 0; r < kRuns<X>; ++r) {
    const int64_t at = i + r * kApart<X>, left = n - r * kApart<X>;
    if (left <= 0) continue;
    const uint32_t codes = load_codes<kRun<X>>(p.codes.codes + at / 2, left, p.codes_aligned);
    const float absmax = p.codes.absmax[at / p.codes.block];
#pragma unroll
    for (int k = 0; k < kRun<X>; ++k)
      x[r * kRun<X> + k] = level[codes >> shift_of(k) & 15u] * absmax;
  }
  if (n <= 0) return;
  Packed<sizeof(X)> out;
  encode_vector<X>(x, out);
  store_runs<kRun<X>>(static_cast<X*>(p.values) + i, out, kApart<X>, n, p.aligned);
}

Problem problem(const Nf4View& codes, const TensorView& x) {
  return {x.data, codes, is_aligned(x.data), is_aligned(codes.codes)};
}

}  // namespace

void nf4_encode(const Nf4View& out, const TensorView& x, void* stream) {
  check_nf4("nf4_encode", "x", out, x);
  if (x.numel() == 0) return;
  with_float(x.dtype, [&](auto type) {
    launch("nf4_encode", encode_kernel<decltype(type)>, ceil_div(x.numel(), kBlockSpan), kThreads,
           stream, problem(out, x));
  });
}

void nf4_decode(const TensorView& out, const Nf4View& x, void* stream) {
  check_nf4("nf4_decode", "out", x, out);
  if (x.numel == 0) return;
  with_float(out.dtype, [&](auto type) {
    launch("nf4_decode", decode_kernel<decltype(type)>, ceil_div(x.numel, kBlockSpan), kThreads,
           stream, problem(x, out));
  });
}

}  // namespace quaver::cuda
