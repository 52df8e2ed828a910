// The path of FP8-LM's states (f16, e4m3 and f16 with one scale each, rounded stochastically, under
// an e4m3 gradient) for weights that are normal numbers of f16. Its bits are those of adam.cu's
// general code. That a weight is a normal number says that no value is NaN, so that rounding needs
// no cases: adding noise and dropping the lower bits is a conversion toward zero.
#pragma once

#include "adam_entry.h"

namespace quaver::cuda {

// The largest codes that a thread stored, without signs, each at the top of a word: of both halves
// of the words of weights and second moments, and of the four bytes of first moments.
struct CodeMaxima {
  uint32_t weight[2], exp_avg[4], exp_avg_sq[2];
};

QUAVER_DEVICE void raise_halves(uint32_t (&most)[2], uint32_t word) {
  most[0] = max_bits(most[0], word << 17);
  most[1] = max_bits(most[1], word << 1);
}

QUAVER_DEVICE void raise_bytes(uint32_t (&most)[4], uint32_t word) {
#pragma unroll
  for (int b = 0; b < 4; ++b) most[b] = max_bits(most[b], word << (25 - 8 * b));
}

// Magnitudes of what was stored: codes are ordered as the values are.
QUAVER_DEVICE void raise_stored(const CodeMaxima& most, const Plan& p, uint32_t (&seen)[kStates]) {
  const uint32_t weight = max_bits(most.weight[0], most.weight[1]) >> 17;
  const uint32_t second = max_bits(most.exp_avg_sq[0], most.exp_avg_sq[1]) >> 17;
  const uint32_t first = max_bits(max_bits(most.exp_avg[0], most.exp_avg[1]),
                                  max_bits(most.exp_avg[2], most.exp_avg[3])) >>
                         25;
  const float x[kStates] = {decode(f16{static_cast<uint16_t>(weight)}),
                            decode(e4m3{static_cast<uint8_t>(first)}),
                            decode(f16{static_cast<uint16_t>(second)})};
#pragma unroll
  for (int k = 0; k < kStates; ++k)
    seen[k] = max_bits(seen[k], magnitude_bits(x[k] * p.new_scale[k]));
}

// The starts of four elements' sequences. Their upper halves seldom differ.
QUAVER_DEVICE void dither_starts(const Dither& d, uint64_t index, uint32_t (&start)[kQuad]) {
  const uint32_t low = static_cast<uint32_t>(index), high = uint32_t(index >> 32);
  if (low <= 0xffffffffu - (kQuad - 1)) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) start[j] = dither_start(d, low + j, high);
    return;
  }
#pragma unroll
  for (int j = 0; j < kQuad; ++j)
    start[j] = dither_start(d, low + j, high + (low + j < low ? 1u : 0u));
}

constexpr float kLeastNormal = 1.0f / (1 << (Format<e4m3>::bias - 1));
// The bits that a normal number loses when it becomes a code.
constexpr uint32_t kDropped = (1u << (23 - Format<e4m3>::mantissa)) - 1u;

// A magnitude below the normal numbers of e4m3, rounded toward zero.
QUAVER_DEVICE float rounded_down(float a) {
  constexpr float aligner = kLeastNormal / (1 << Format<e4m3>::mantissa) * (1 << 23);
  return __fadd_rz(a, aligner) - aligner;
}

#if defined(__CUDA_ARCH__)
// settle_exp_avg of adam.h for a number, in e4m3 and with noise.
QUAVER_DEVICE float settle_number(float y, float m, float grad, uint32_t noise) {
  const float a = fabsf(y);
  const uint32_t bits = bit_cast<uint32_t>(y);
  const bool weak = 8.0f * fabsf(grad) < fabsf(m);
  const uint32_t drawn = (bits + (weak ? 0u : noise >> (9 + Format<e4m3>::mantissa))) & ~kDropped;
  const uint32_t small = bit_cast<uint32_t>(rounded_down(a)) | (bits & 0x80000000u);
  return bit_cast<float>(a < kLeastNormal ? small : drawn);
}

// The e4m3 copy of two words of f16 codes, none of them NaN.
QUAVER_DEVICE uint32_t copy_of(uint32_t low, uint32_t high) {
#if __CUDA_ARCH__ >= 890
  static_assert(kMasterToFp8 == 128.0f, "the factor is 2^-7 in f16");
  uint32_t word;
  // The product is inexact only where it rounds to zero in e4m3.
  asm("{.reg .b32 l, h; .reg .b16 a, b; mul.rn.f16x2 l, %1, %3; mul.rn.f16x2 h, %2, %3; "
      "cvt.rn.satfinite.e4m3x2.f16x2 a, l; cvt.rn.satfinite.e4m3x2.f16x2 b, h; "
      "mov.b32 %0, {a, b};}"
      : "=r"(word)
      : "r"(low), "r"(high), "r"(0x20002000u));
  return word;
#else
  float x[kQuad];
  decode_word(f16{}, low, x);
  decode_word(f16{}, high, x + 2);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) x[j] *= 1.0f / kMasterToFp8;
  return convert_finite_word<e4m3>(x);
#endif
}

// Four elements, in place. Returns whether it could; else nothing has changed.
QUAVER_DEVICE bool update_quick(const Plan& p, uint64_t element, AnyQuad (&state)[kStates],
                                const AnyQuad& gradient, CodeMaxima& most) {
  float w[kQuad], m[kQuad], v[kQuad], grad[kQuad];
  decode_quad<f16>(state[0], 0, w);
  decode_quad<e4m3>(state[1], 0, m);
  decode_quad<f16>(state[2], 0, v);
  decode_quad<e4m3>(gradient, 0, grad);
  uint32_t odd = 0;  // how far a weight is from normal numbers
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    grad[j] *= p.grad_scale;
    const AdamElement x =
        adamw(p.step, {w[j] * p.scale[0], m[j] * p.scale[1], v[j] * p.scale[2]}, grad[j]);
    w[j] = x.weight * p.inverse[0];
    m[j] = x.exp_avg;
    v[j] = x.exp_avg_sq * p.inverse[2];
    odd = max_bits(odd, magnitude_bits(w[j]) - 0x38800000u);  // 2^-14
  }
  if (odd >= 0x7f000000u - 0x38800000u) return false;
  uint32_t start[kQuad];
  dither_starts(p.dither, element, start);
  float y[kQuad];
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const uint32_t noise = weight_noise(p.dither, start[j]) >> (9 + Format<f16>::mantissa);
    w[j] = bit_cast<float>(bit_cast<uint32_t>(w[j]) + noise);
    y[j] = settle_number(m[j] * p.inverse[1], m[j], grad[j], exp_avg_noise(p.dither, start[j]));
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    asm("cvt.rz.satfinite.f16x2.f32 %0, %1, %2;"
        : "=r"(state[0].word[k])
        : "f"(w[2 * k + 1]), "f"(w[2 * k]));
    state[2].word[k] = convert_finite_word<f16>(v + 2 * k);
    raise_halves(most.weight, state[0].word[k]);
    raise_halves(most.exp_avg_sq, state[2].word[k]);
  }
  state[1].word[0] = convert_finite_word<e4m3>(y);
  raise_bytes(most.exp_avg, state[1].word[0]);
  return true;
}
#endif

}  // namespace quaver::cuda
