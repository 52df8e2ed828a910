// One pass that encodes whole groups of ordinary values to expanded codes, with the bits that
// codec.h's and adam.h's functions give one after the other. Ordinary values need none of their
// branches for NaN, infinity and saturation. Rounding is as in registers.h.
//
// For simd_adam.cpp only, which is compiled once per instruction set.
#pragma once

#include "lanes.h"
#include "quaver/adam.h"
#include "span.h"
#include "spans.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

// log2_coarse.
QUAVER_INLINE Floats log2_lanes(const Floats& x) {
  const Ints bits = bits_of(x) - lanes(0x3f3504f3);
  const Floats e = to_floats(shifted_right<23>(bits));
  const Floats u = floats_of((bits & lanes(0x7fffff)) + lanes(0x3f3504f3)) - lanes(1.0f);
  Floats p = fma(lanes(-0.206591845f), u, lanes(0.32215485f));
  p = fma(p, u, lanes(-0.367489964f));
  p = fma(p, u, lanes(0.479348004f));
  p = fma(p, u, lanes(-0.721131861f));
  p = fma(p, u, lanes(1.4427135f));
  return fma(p, u, e);
}

// exp2_coarse.
QUAVER_INLINE Floats exp2_lanes(const Floats& x) {
  const Floats to_integer = lanes(12582912.0f);
  const Floats shifted = x + to_integer;
  const Floats f = x - (shifted - to_integer);
  Floats p = fma(lanes(9.58285294e-3f), f, lanes(5.59064262e-2f));
  p = fma(p, f, lanes(2.40240991e-1f));
  p = fma(p, f, lanes(6.93124175e-1f));
  p = fma(p, f, lanes(1.0f));
  return floats_of(bits_of(p) + shifted_left<23>(bits_of(shifted)));
}

// log2_expanded of a group. In a loop of its own, so that the processor's window holds the chains
// of several strides.
inline void log2_group(float* out, const float* x, const Expander& e) {
  for (int64_t j = 0; j < kGroup; j += kValues) {
    const Floats log2 = log2_lanes(magnitude(load_values(x + j)) * lanes(e.lift));
    store_lanes(out + j, fma(lanes(e.power), log2, lanes(e.offset)));
  }
}

// expanded(), without sign.
QUAVER_INLINE Floats expanded_lanes(const Floats& log2_y) {
  return exp2_lanes(larger(log2_y, lanes(-40.0f)));
}

// The nearest codes of magnitudes, all by kBase too high.
template <class T>
constexpr int kBase = (127 + 1 - Format<T>::bias) << Format<T>::mantissa;

template <class T>
QUAVER_INLINE Ints round_lanes(const Floats& y) {
  constexpr int drop = 23 - Format<T>::mantissa;
  constexpr int min_normal = (127 + 1 - Format<T>::bias) << 23;
  const Ints e = larger(bits_of(y) & lanes(0x7f800000), lanes(min_normal));
  const Ints magic = e + lanes(drop << 23);
  const Floats sum = y + floats_of(magic);
  return bits_of(sum) - magic + shifted_right<drop>(e);
}

// The values of kValues codes over their scale, by a table of all 256.
QUAVER_INLINE Floats look_up(const uint8_t* codes, const float* values) {
  return each<Floats>([&](int k) {
    const uint8_t* code = codes + k * kRegister;
#if defined(__AVX512F__)
    // The magnitudes' half of the table is eight registers, of which an instruction reads two.
    const Integers c =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(code)));
    const auto pair = [&](int i) {
      return _mm512_permutex2var_ps(_mm512_loadu_ps(values + 32 * i), c,
                                    _mm512_loadu_ps(values + 32 * i + 16));
    };
    const Mask odd = _mm512_test_epi32_mask(c, all(0x20));
    const Mask upper = _mm512_test_epi32_mask(c, all(0x40));
    const Register low = _mm512_mask_blend_ps(odd, pair(0), pair(1));
    const Register high = _mm512_mask_blend_ps(odd, pair(2), pair(3));
    const Integers sign = _mm512_slli_epi32(both(c, all(0x80)), 24);
    return floats_of(_mm512_or_si512(bits_of(_mm512_mask_blend_ps(upper, low, high)), sign));
#else
    const auto value = [&](int i) { return values[code[i]]; };
    return _mm256_setr_ps(value(0), value(1), value(2), value(3), value(4), value(5), value(6),
                          value(7));
#endif
  });
}

// The ranges of groups (GroupRange), from which their scales are chosen, and the scales with the
// constants of their expansion.
constexpr int64_t kGroups = kBlock / kGroup;

struct GroupRanges {
  uint32_t most[kGroups] = {}, least[kGroups] = {};
};

struct GroupScales {
  float scale[kGroups], lift[kGroups], power[kGroups], offset[kGroups];
};

// Chooses the scales of all groups at once, because one alone is a long chain of dependent
// operations.
template <class T>
inline GroupScales choose_scales(const GroupRanges& r) {
  GroupScales s;
  QUAVER_SIMD
  for (int64_t k = 0; k < kGroups; ++k) {
    s.scale[k] = expanded_scale<T>({r.most[k], r.least[k]});
    const Expander e = expander<T>(s.scale[k]);
    s.lift[k] = e.lift;
    s.power[k] = e.power;
    s.offset[k] = e.offset;
  }
  return s;
}

// One step of group k: w is updated; m and v become the values to encode. Returns whether the
// encoders below can take them.
inline bool adam_group(const AdamStep& s, float* w, float* m, float* v, const float* grad,
                       const uint8_t* exp_avg, float exp_avg_scale, const float* exp_avg_values,
                       const uint8_t* exp_avg_sq, float exp_avg_sq_scale,
                       const float* exp_avg_sq_values, GroupRanges* range_m, GroupRanges* range_v,
                       int64_t group) {
  Integers most_m = all(0), least_m = all(-1);
  Integers most_v = most_m, least_v = least_m;
  const Integers minus_one = least_m;
  for (int64_t j = 0; j < kGroup; j += kValues) {
    for (int64_t k = 0; k < kValues; k += 16) {
      prefetch(grad + j + k);
      prefetch(w + j + k);
    }
    const Floats g = load_values(grad + j);
    const Floats old_m = look_up(exp_avg + j, exp_avg_values) * lanes(exp_avg_scale);
    const Floats new_m = lanes(s.beta1) * old_m + lanes(s.one_minus_beta1) * g;
    store_lanes(m + j, new_m);
    const Floats old_v = look_up(exp_avg_sq + j, exp_avg_sq_values) * lanes(exp_avg_sq_scale);
    const Floats new_v = lanes(s.beta2) * old_v + lanes(s.one_minus_beta2) * (g * g);
    store_lanes(v + j, new_v);
    const Floats denominator = root(new_v) * lanes(s.inverse_sqrt_c2) + lanes(s.eps);
    store_lanes(w + j,
                lanes(s.decay) * load_values(w + j) - lanes(s.step_size) * (new_m / denominator));
    const Ints bits_m = bits_of(magnitude(new_m)), bits_v = bits_of(new_v);
    const auto least = [&](Integers seen, Integers bits) {
      return QUAVER_INT(min_epu32)(seen, QUAVER_INT(add_epi32)(bits, minus_one));
    };
    for (int k = 0; k < kRegisters; ++k) {
      most_m = larger_bits(most_m, bits_m.of[k]);
      least_m = least(least_m, bits_m.of[k]);
      most_v = larger_bits(most_v, bits_v.of[k]);
      least_v = least(least_v, bits_v.of[k]);
    }
  }
  range_m->most[group] = largest_bits(most_m);
  range_m->least[group] = ~largest_bits(inverted(least_m));
  range_v->most[group] = largest_bits(most_v);
  range_v->least[group] = ~largest_bits(inverted(least_v));
  constexpr uint32_t infinity = 0x7f800000u;  // a sign is beyond it, too
  return range_m->most[group] < infinity && range_v->most[group] < infinity;
}

// settle_exp_avg and its rounding, by kZero too high.
template <class T>
constexpr int kZero = (127 - Format<T>::bias) << Format<T>::mantissa;

template <class T>
QUAVER_INLINE Ints settle_lanes(const Floats& y, const Masks& weak) {
  constexpr int mantissa = Format<T>::mantissa, drop = 23 - mantissa;
  constexpr float min_normal = 1.0f / (1 << (Format<T>::bias - 1));
  const Ints bits = bits_of(y);
  const Ints half = (shifted_right<drop>(bits) & lanes(1)) + lanes((1 << (drop - 1)) - 1);
  const Ints normal = shifted_right<drop>(bits + unless(weak, half));
  const Ints below = truncated(y * lanes((1 << mantissa) / min_normal)) + lanes(kZero<T>);
  return blended(normal, below, y < lanes(min_normal));
}

// Where the first moment rounds toward zero.
QUAVER_INLINE Masks is_weak(const Floats& m, const float* grad) {
  return lanes(8.0f) * magnitude(load_values(grad)) < magnitude(m);
}

template <class T>
inline void encode_exp_avg(uint8_t* out, const float* m, const float* grad, const Expander& e) {
  alignas(64) float log2_y[kGroup];
  log2_group(log2_y, m, e);
  for (int64_t j = 0; j < kGroup; j += kValues) {
    const Floats x = load_values(m + j);
    const Ints codes =
        settle_lanes<T>(expanded_lanes(load_values(log2_y + j)), is_weak(x, grad + j));
    store_codes(out + j, QUAVER_BITS(or)(bytes(codes, kZero<T>), sign_bytes(x)));
  }
}

// The same of n first moments without expansion, whole registers of them: `y` in the format's
// domain, of any values.
template <class T>
inline void settle_codes(T* out, const float* y, const float* m, const float* grad, int64_t n) {
  for (int64_t j = 0; j < n; j += kValues) {
    const Floats x = load_values(y + j);
    if (__builtin_expect(any_nan(x), 0)) {
      for (int64_t k = j; k < j + kValues; ++k)
        out[k] = encode_nearest<T>(settle_exp_avg<T>(y[k], m[k], grad[k], false, 0));
      continue;
    }
    const Floats most = lanes(Format<T>::finite_max), a = magnitude(x);
    const Floats kept = each<Floats>([&](int k) { return QUAVER_PS(min)(a.of[k], most.of[k]); });
    const Ints codes = settle_lanes<T>(kept, is_weak(load_values(m + j), grad + j));
    store_codes(out + j, QUAVER_BITS(or)(bytes(codes, kZero<T>), sign_bytes(x)));
  }
}

// Encodes second moments, which have no sign.
template <class T>
inline void encode_exp_avg_sq(uint8_t* out, const float* v, const Expander& e) {
  constexpr float least = 1.0f / (1 << (Format<T>::bias - 1 + Format<T>::mantissa));
  alignas(64) float log2_y[kGroup];
  log2_group(log2_y, v, e);
  for (int64_t j = 0; j < kGroup; j += kValues) {
    const Floats x = load_values(v + j);
    // keep_nonzero
    const Floats y = larger(expanded_lanes(load_values(log2_y + j)), lanes(least));
    const Floats nonzero = floats_of(unless(x == lanes(0.0f), bits_of(y)));
    store_codes(out + j, bytes(round_lanes<T>(nonzero), kBase<T>));
  }
}

}  // namespace
}  // namespace quaver::cpu::QUAVER_ISA
