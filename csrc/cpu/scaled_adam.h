// Adam's step of FP8-LM's states in registers: a weight and a second moment in f16 and a first
// moment in e4m3, each under one scale, weight and first moment rounded stochastically
// (arXiv 2310.18313, section 2.2). Its bits are those of the general code. It takes weights that
// are normal numbers of f16: then no value is NaN, and rounding needs no cases, because adding
// noise and dropping the lower bits is a conversion toward zero.
//
// For simd_adam.cpp only, which is compiled once per instruction set.
#pragma once

#include <algorithm>

#include "expanded.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

// Whether the step of a span is this one.
inline bool has_scaled_states(const AdamSpan& p) {
  auto one_scale = [](const StateSpan& s, DType type) {
    return s.type == type && s.scaling == Scaling::tensor;
  };
  return one_scale(p.weight, DType::f16) && one_scale(p.exp_avg, DType::e4m3) &&
         one_scale(p.exp_avg_sq, DType::f16) && p.stochastic && p.stochastic_exp_avg &&
         p.remainder.bytes == 0 && p.rates == nullptr && halves_are_exact(p.exp_avg.scale) &&
         halves_are_exact(p.grad_scale);
}

// The largest codes that were stored, without signs: words, bytes and words.
struct CodeMaxima {
  Integers weight = all(0), exp_avg = all(0), exp_avg_sq = all(0);
};

// The largest of a register's codes of type Code.
template <class Code>
inline uint32_t largest_code(Integers codes) {
  constexpr int64_t n = sizeof(Integers) / sizeof(Code);
  alignas(64) Code code[n];
  QUAVER_BITS(store)(reinterpret_cast<Integers*>(code), codes);
  return *std::max_element(code, code + n);
}

QUAVER_INLINE Ints operator^(const Ints& a, const Ints& b) {
  return each<Ints>([&](int k) { return QUAVER_BITS(xor)(a.of[k], b.of[k]); });
}
QUAVER_INLINE Ints operator*(const Ints& a, const Ints& b) {
  return each<Ints>([&](int k) { return QUAVER_INT(mullo_epi32)(a.of[k], b.of[k]); });
}
template <int n>
QUAVER_INLINE Ints shifted_down(const Ints& x) {  // of unsigned integers
  return each<Ints>([&](int k) { return QUAVER_INT(srli_epi32)(x.of[k], n); });
}
QUAVER_INLINE Ints words_of(uint32_t x) { return lanes(static_cast<int32_t>(x)); }

// mix_bits
QUAVER_INLINE Ints mixed(Ints x) {
  x = (x ^ shifted_down<16>(x)) * words_of(0x85EBCA6Bu);
  x = (x ^ shifted_down<13>(x)) * words_of(0xC2B2AE35u);
  return x ^ shifted_down<16>(x);
}

// dither_start of elements `low` and the following, which do not wrap.
QUAVER_INLINE Ints starts_of(const Dither& d, uint32_t low, uint32_t high) {
  alignas(64) static constexpr int32_t count[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                    8, 9, 10, 11, 12, 13, 14, 15};
  const Integers counted = QUAVER_BITS(load)(reinterpret_cast<const Integers*>(count));
  const Ints index = each<Ints>([&](int k) {
    return QUAVER_INT(add_epi32)(counted, all(static_cast<int32_t>(low + k * kRegister)));
  });
  return mixed(index ^ words_of(d.key)) + words_of(high * 0xC13FA9A9u);
}

// f16 codes of two registers, in order; kRounding as of the instruction.
template <int kRounding>
QUAVER_INLINE Integers half_codes(Register low, Register high) {
#if defined(__AVX512F__)
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(low, kRounding)),
                            _mm512_cvtps_ph(high, kRounding), 1);
#else
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm256_cvtps_ph(low, kRounding)),
                                 _mm256_cvtps_ph(high, kRounding), 1);
#endif
}

// Stores f16 codes of numbers, of which none becomes infinite.
template <int kRounding>
QUAVER_INLINE void store_halves(void* out, const Floats& x, Integers* most) {
  for (int k = 0; k < 2; ++k) {
    const Integers codes = half_codes<kRounding>(x.of[2 * k], x.of[2 * k + 1]);
    QUAVER_BITS(storeu)(static_cast<Integers*>(out) + k, codes);
    const Integers magnitude = both(codes, QUAVER_INT(set1_epi16)(0x7fff));
    *most = QUAVER_INT(max_epu16)(*most, magnitude);
  }
}

// settle_exp_avg with noise, of numbers, and its rounding: codes by kZero too high.
template <class T>
QUAVER_INLINE Ints draw_lanes(const Floats& y, const Masks& weak, const Ints& noise) {
  constexpr int mantissa = Format<T>::mantissa, drop = 23 - mantissa;
  constexpr float min_normal = 1.0f / (1 << (Format<T>::bias - 1));
  const Floats limit = lanes(Format<T>::finite_max), any = magnitude(y);
  const Floats a = each<Floats>([&](int k) { return QUAVER_PS(min)(any.of[k], limit.of[k]); });
  const Ints drawn = bits_of(a) + unless(weak, shifted_down<9 + mantissa>(noise));
  const Ints below = truncated(a * lanes((1 << mantissa) / min_normal)) + lanes(kZero<T>);
  return blended(shifted_right<drop>(drawn), below, a < lanes(min_normal));
}

// Whether all are normal numbers of f16.
QUAVER_INLINE bool are_normal(const Floats& x) {
  // Less 2^-14, other magnitudes wrap or are beyond those of numbers.
  const Ints above = bits_of(magnitude(x)) - lanes(0x38800000);
  Integers most = above.of[0];
  for (int k = 1; k < kRegisters; ++k) most = larger_bits(most, above.of[k]);
  const Integers limit = all(0x7f800000 - 0x38800000);
#if defined(__AVX512F__)
  return _mm512_cmpge_epu32_mask(most, limit) == 0;
#else
  const __m256i other = _mm256_cmpeq_epi32(_mm256_max_epu32(most, limit), most);
  return _mm256_testz_si256(other, other) != 0;
#endif
}

// The step of kValues elements from i on. Returns false, and has changed nothing, where it is not
// for them.
template <class Grad>
QUAVER_INLINE bool step_scaled(const AdamSpan& p, const AdamStep& s, int64_t i, CodeMaxima* most) {
  const uint64_t first = p.first + static_cast<uint64_t>(i);
  const auto low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
  if (low > UINT32_MAX - kValues) return false;
  auto* weight = static_cast<f16*>(p.weight.values) + i;
  auto* exp_avg = static_cast<e4m3*>(p.exp_avg.values) + i;
  auto* exp_avg_sq = static_cast<f16*>(p.exp_avg_sq.values) + i;
  const auto* grad = static_cast<const Grad*>(p.grad) + i;
  for (int64_t k = 0; k < kValues; k += 32) prefetch(weight + k), prefetch(exp_avg_sq + k);
  prefetch(grad, kValues * int64_t(sizeof(Grad)));
  prefetch(exp_avg);

  Floats g;
  if constexpr (sizeof(Grad) == 1)
    g = load_values(grad, p.grad_scale);
  else
    g = scaled(load_values(grad), p.grad_scale);
  const Floats v = lanes(s.beta2) * scaled(load_values(exp_avg_sq), p.exp_avg_sq.scale) +
                   lanes(s.one_minus_beta2) * (g * g);
  const Floats m =
      lanes(s.beta1) * load_values(exp_avg, p.exp_avg.scale) + lanes(s.one_minus_beta1) * g;
  const Floats denominator = root(v) * lanes(s.inverse_sqrt_c2) + lanes(s.eps);
  const Floats w = lanes(s.decay) * scaled(load_values(weight), p.weight.scale) -
                   lanes(s.step_size) * (m / denominator);
  const Floats w_code = scaled(w, 1.0f / p.weight.new_scale);
  if (__builtin_expect(!are_normal(w_code), 0)) return false;

  const Ints start = starts_of(p.dither, low, high);
  const Floats y = scaled(m, 1.0f / p.exp_avg.new_scale);
  const Masks weak = lanes(8.0f) * magnitude(g) < magnitude(m);
  const Ints codes =
      draw_lanes<e4m3>(y, weak, start * words_of(0xC2B2AE35u) + words_of(p.dither.exp_avg));
  const Integers magnitudes = bytes(codes, kZero<e4m3>);
  most->exp_avg = QUAVER_INT(max_epu8)(most->exp_avg, magnitudes);
  store_codes(exp_avg, QUAVER_BITS(or)(magnitudes, sign_bytes(y)));

  const Floats limit = lanes(Format<f16>::finite_max);
  const Floats v_code = scaled(v, 1.0f / p.exp_avg_sq.new_scale);
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  constexpr int toward_zero = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
  store_halves<nearest>(
      exp_avg_sq, each<Floats>([&](int k) { return QUAVER_PS(min)(v_code.of[k], limit.of[k]); }),
      &most->exp_avg_sq);
  const Ints noise = shifted_down<9 + 10>(start + words_of(p.dither.weight));
  store_halves<toward_zero>(weight, floats_of(bits_of(w_code) + noise), &most->weight);
  if (p.fp8 != nullptr)
    encode_values(reinterpret_cast<e4m3*>(p.fp8) + i,
                  scaled(load_values(weight), 1.0f / kMasterToFp8));
  return true;
}

}  // namespace
}  // namespace quaver::cpu::QUAVER_ISA
