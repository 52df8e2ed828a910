// NF4 codes to and from values. A block of threads takes 4096 flat elements, 16 a thread, which are
// whole blocks of codes of every size.
#include "../check_nf4.h"
#include "runtime_type.h"

namespace quaver::cuda {
namespace {

static_assert(kNf4MaxBlock == kBlockSpan, "a block of threads has whole blocks of codes");
static_assert(kNf4MinBlock % kVector == 0, "a thread's elements share an absmax");

constexpr int kCodeBytes = kVector / 2;

struct Problem {
  void* values;
  DType type;
  Nf4View codes;
  bool aligned, codes_aligned;
};

// The 16 codes of a thread as they lie in memory: two words of 4 bytes.
using Codes = uint2;

QUAVER_DEVICE Codes load_codes(const uint8_t* from, int64_t n, bool aligned) {
  if (aligned && n >= kVector) return *reinterpret_cast<const uint2*>(from);
  Codes c = {0, 0};
#pragma unroll
  for (int b = 0; b < kCodeBytes; ++b) {
    if (2 * b >= n) continue;
    const uint32_t byte = uint32_t(from[b]) << b % 4 * 8;
    if (b < 4)
      c.x |= byte;
    else
      c.y |= byte;
  }
  return c;
}

QUAVER_DEVICE void store_codes(uint8_t* to, const Codes& c, int64_t n, bool aligned) {
  if (aligned && n >= kVector) {
    *reinterpret_cast<uint2*>(to) = c;
    return;
  }
#pragma unroll
  for (int b = 0; b < kCodeBytes; ++b)
    if (2 * b < n) to[b] = static_cast<uint8_t>((b < 4 ? c.x : c.y) >> b % 4 * 8);
}

// The place of element j's code in its word: the even element's is in the high bits of its byte.
QUAVER_DEVICE int shift_of(int j) { return j % 8 / 2 * 8 + (j % 2 == 0 ? 4 : 0); }

__global__ void __launch_bounds__(kThreads) encode_kernel(Problem p) {
  __shared__ uint32_t most[kBlockSpan / kNf4MinBlock];
  const int thread = int(threadIdx.x), place = thread * kVector / int(p.codes.block);
  const int64_t i = int64_t(blockIdx.x) * kBlockSpan + thread * kVector, n = p.codes.numel - i;
  if (thread < kBlockSpan / kNf4MinBlock) most[thread] = 0;
  __syncthreads();
  const AnyPacked loaded = load_any(p.values, p.type, i, n, p.aligned);
  float x[kVector];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    float part[kQuad];
    decode_any(p.type, loaded, q, 1.0f, part);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) x[q * kQuad + k] = part[k];
  }
  atomicMax(&most[place], amax_bits(x));
  __syncthreads();
  if (n <= 0) return;
  const float absmax = nf4_absmax(most[place]), inverse = nf4_inverse(absmax);
  if (i % p.codes.block == 0) p.codes.absmax[i / p.codes.block] = absmax;
  Codes c = {0, 0};
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const uint32_t code = (j < n ? nf4_code(x[j] * inverse) : kNf4Zero) << shift_of(j);
    if (j < 8)
      c.x |= code;
    else
      c.y |= code;
  }
  store_codes(p.codes.codes + i / 2, c, n, p.codes_aligned);
}

__global__ void __launch_bounds__(kThreads) decode_kernel(Problem p) {
  __shared__ float level[kNf4Levels];
  if (threadIdx.x < kNf4Levels) level[threadIdx.x] = nf4_level(threadIdx.x);
  __syncthreads();
  const int64_t i = int64_t(blockIdx.x) * kBlockSpan + int64_t(threadIdx.x) * kVector;
  const int64_t n = p.codes.numel - i;
  if (n <= 0) return;
  const Codes c = load_codes(p.codes.codes + i / 2, n, p.codes_aligned);
  const float absmax = p.codes.absmax[i / p.codes.block];
  AnyPacked out = {};
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    float x[kQuad];
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      const int j = q * kQuad + k;
      x[k] = level[(j < 8 ? c.x : c.y) >> shift_of(j) & 15u] * absmax;
    }
    encode_any(p.type, x, 1.0f, q, out);
  }
  const int64_t bytes = size_of(p.type);
  store(static_cast<char*>(p.values) + i * bytes, out, int(bytes), n, p.aligned);
}

Problem problem(const Nf4View& codes, const TensorView& x) {
  return {x.data, x.dtype, codes, is_aligned(x.data), is_aligned(codes.codes)};
}

}  // namespace

void nf4_encode(const Nf4View& out, const TensorView& x, void* stream) {
  check_nf4("nf4_encode", "x", out, x);
  if (x.numel() == 0) return;
  launch("nf4_encode", encode_kernel, ceil_div(x.numel(), kBlockSpan), kThreads, stream,
         problem(out, x));
}

void nf4_decode(const TensorView& out, const Nf4View& x, void* stream) {
  check_nf4("nf4_decode", "out", x, out);
  if (x.numel == 0) return;
  launch("nf4_decode", decode_kernel, ceil_div(x.numel, kBlockSpan), kThreads, stream,
         problem(x, out));
}

}  // namespace quaver::cuda
