// A plain weight as an optimizer's kernel reads and writes it, 16 elements a thread: f32, 16 bits
// that round to nearest or stochastically, or bf16 with the low bits of its f32 master beside it.
#pragma once

#include "pairs.h"
#include "quaver/dither.h"
#include "remainder.h"

namespace quaver::cuda {

struct Master {
  void* weight;
  Remainder remainder;
  DType type;
  bool stochastic, aligned;
  bool whole;  // of a warp's threads all elements are there and aligned (pairs.h)
};

// A thread's elements as they are stored.
struct MasterBits {
  AnyPacked weight, low;
};

QUAVER_DEVICE MasterBits load_master(const Master& m, int64_t i, int64_t n) {
  MasterBits bits = {load_paired(m.weight, m.type, i, n, m.aligned, m.whole), {}};
  if (m.remainder.bytes != 0)
    bits.low = load_paired(m.remainder.data, remainder_type(m.remainder), i, n, m.aligned, m.whole);
  return bits;
}

QUAVER_DEVICE void decode_master(const Master& m, const MasterBits& bits, int quad,
                                 float (&w)[kQuad]) {
  decode_any(m.type, bits.weight, quad, 1.0f, w);
  if (m.remainder.bytes == 0) return;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const int k = quad * kQuad + j;
    w[j] = join_master(bf16{static_cast<uint16_t>(half_of(bits.weight, k))},
                       low_of(m.remainder, bits.low, k));
  }
}

QUAVER_DEVICE uint32_t rounded_half(const Master& m, const Dither& dither, float w,
                                    uint64_t element) {
  const uint32_t noise = weight_noise(
      dither, dither_start(dither, static_cast<uint32_t>(element), uint32_t(element >> 32)));
  return m.type == DType::bf16 ? encode_weight_stochastic<bf16>(w, noise).bits
                               : encode_weight_stochastic<f16>(w, noise).bits;
}

// The thread's first element is `i`.
QUAVER_DEVICE void encode_master(const Master& m, const Dither& dither, int64_t i, int quad,
                                 const float (&w)[kQuad], MasterBits& bits) {
  if (m.remainder.bytes == 0 && !m.stochastic)
    return encode_any(m.type, w, 1.0f, quad, bits.weight);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const int k = quad * kQuad + j;
    if (m.remainder.bytes == 0) {
      put_half(bits.weight, k, rounded_half(m, dither, w[j], static_cast<uint64_t>(i + k)));
      continue;
    }
    put_half(bits.weight, k, put_low(m.remainder, w[j], bits.low, k).bits);
  }
}

QUAVER_DEVICE void store_master(const Master& m, const MasterBits& bits, int64_t i, int64_t n) {
  store_paired(m.weight, m.type, i, bits.weight, n, m.aligned, m.whole);
  if (m.remainder.bytes != 0)
    store_paired(m.remainder.data, remainder_type(m.remainder), i, bits.low, n, m.aligned, m.whole);
}

}  // namespace quaver::cuda
