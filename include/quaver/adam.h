// AdamW of one element (Loshchilov & Hutter, arXiv 1711.05101), and the bounds that let a step with
// tensor-scaled states run in one pass (FP8-LM, arXiv 2310.18313, section 2.2).
#pragma once

#include <cmath>

#include "quaver/fp8.h"
#include "quaver/math.h"
#include "quaver/scale.h"

namespace quaver {

// The constants of one step of one tensor, computed once in f64.
struct AdamStep {
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float eps;
  float decay;            // 1 - lr * weight_decay
  float step_size;        // lr / (1 - beta1^t)
  float inverse_sqrt_c2;  // 1 / sqrt(1 - beta2^t)
  float update_bound;     // upper bound of |w' - decay * w|
};

QUAVER_HD AdamStep adam_step(double lr, double beta1, double beta2, double eps, double weight_decay,
                             int64_t t) {
  const double c1 = 1.0 - integer_power(beta1, t);
  const double c2 = 1.0 - integer_power(beta2, t);
  AdamStep s;
  s.beta1 = static_cast<float>(beta1);
  s.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  s.eps = static_cast<float>(eps);
  s.decay = static_cast<float>(1.0 - lr * weight_decay);
  s.step_size = static_cast<float>(lr / c1);
  s.inverse_sqrt_c2 = static_cast<float>(1.0 / ::sqrt(c2));
  // Cauchy-Schwarz on the two moving averages: |m| <= (1-b1) / sqrt((1-b2)(1-b1^2/b2)) * sqrt(v).
  // Twice that leaves room for the rounding of stored moments. Where b1^2 >= b2 the sum diverges
  // and no bound is of use (b1^2t / b2^t would flush every weight to zero): t terms, as for
  // gradients of one size, and a weight that moves further saturates.
  const double ratio = beta2 > 0.0 ? beta1 * beta1 / beta2 : 1.0;
  const double terms = ratio < 1.0 ? 1.0 / (1.0 - ratio) : static_cast<double>(t);
  const double peak = (1.0 - beta1) * ::sqrt(terms / (beta2 < 1.0 ? 1.0 - beta2 : 1.0));
  const double corrected = peak * ::sqrt(c2) / c1;
  s.update_bound = static_cast<float>(2.0 * ::fabs(lr) * (corrected > 1.0 ? corrected : 1.0));
  return s;
}

// The number of the next step after `taken`. A device cannot refuse a damaged count: it stays in
// the range in which the bias corrections are finite.
QUAVER_HD int64_t next_step(int64_t taken) {
  const int64_t counted = taken < 0 ? 0 : taken;
  return counted < INT64_MAX ? counted + 1 : counted;
}

struct AdamElement {
  float weight, exp_avg, exp_avg_sq;
};

QUAVER_HD float next_exp_avg(const AdamStep& s, float exp_avg, float grad) {
  return s.beta1 * exp_avg + s.one_minus_beta1 * grad;
}

QUAVER_HD float next_exp_avg_sq(const AdamStep& s, float exp_avg_sq, float grad) {
  return s.beta2 * exp_avg_sq + s.one_minus_beta2 * (grad * grad);
}

// Of moments that are this step's.
QUAVER_HD float next_weight(const AdamStep& s, AdamElement e) {
  const float denominator = ::sqrtf(e.exp_avg_sq) * s.inverse_sqrt_c2 + s.eps;
  return s.decay * e.weight - s.step_size * (e.exp_avg / denominator);
}

// The step under a second moment that is already this step's.
QUAVER_HD AdamElement adamw_under(const AdamStep& s, AdamElement e, float grad) {
  e.exp_avg = next_exp_avg(s, e.exp_avg, grad);
  e.weight = next_weight(s, e);
  return e;
}

QUAVER_HD AdamElement adamw(const AdamStep& s, AdamElement e, float grad) {
  e.exp_avg_sq = next_exp_avg_sq(s, e.exp_avg_sq, grad);
  return adamw_under(s, e, grad);
}

// Steps value k of a second moment of subsets, f32 or bf16 (Subset-Norm). Returns the new one
// before it is rounded.
QUAVER_HD float step_subset(const AdamStep& s, void* values, DType type, int64_t k, float sum) {
  float* wide = static_cast<float*>(values) + k;
  bf16* narrow = static_cast<bf16*>(values) + k;
  const float v =
      s.beta2 * (type == DType::f32 ? *wide : decode(*narrow)) + s.one_minus_beta2 * sum;
  if (type == DType::f32)
    *wide = v;
  else
    *narrow = encode_nearest<bf16>(v);
  return v;
}

// The learning rate of a subset whose elements share the second moment v.
QUAVER_HD float subset_rate(const AdamStep& s, float v) {
  return s.step_size / (::sqrtf(v) * s.inverse_sqrt_c2 + s.eps);
}

// One step under such a rate; the second moment is left as it is.
QUAVER_HD AdamElement subset_adamw(const AdamStep& s, AdamElement e, float grad, float rate) {
  e.exp_avg = s.beta1 * e.exp_avg + s.one_minus_beta1 * grad;
  e.weight = s.decay * e.weight - rate * e.exp_avg;
  return e;
}

// An FP8 first moment y = m / scale, or m expanded, as it will be rounded to codes of type T:
// toward zero below the format's normal range, and wherever the gradient is small beside the
// moment. To nearest, beta1 * y can round back to y (for the smallest codes always, for all where
// beta1 is near 1), so the moment of a weight that gets no more gradient would never decay while
// its second moment does, and m / sqrt(v) would run away. Toward zero, what is stored never exceeds
// what Adam computed, whatever the scale, k or beta1. A weight that still learns has gradients that
// exceed its moment most of the time, so its average is not pulled down. An FP8 second moment
// never becomes zero instead (keep_nonzero of codec.h).
//
// `noise` rounds stochastically where nearest rounding would apply. Under a steady gradient g a
// moment of 3 bits comes to rest where (1 - beta1) * (g - m) is half an ulp, up to 30 % below g;
// in expectation it reaches g. Below the normal range a code drawn at random would be many times
// its value, and m / sqrt(v) a step of as many learning rates: there it still rounds toward zero.
template <class T>
QUAVER_HD float settle_exp_avg(float y, float m, float grad, bool stochastic, uint32_t noise) {
  using F = Format<T>;
  constexpr float min_normal = 1.0f / (1 << (F::bias - 1));
  constexpr float step = min_normal / (1 << F::mantissa);  // the smallest subnormal
  constexpr float aligner = step * (1 << 23);              // its ulp is `step`: adding it rounds
  constexpr uint32_t dropped = (1u << (23 - F::mantissa)) - 1u;
  const uint32_t sign = bit_cast<uint32_t>(y) & 0x80000000u;
  const uint32_t magnitude = bit_cast<uint32_t>(y) & 0x7fffffffu;
  const float a = bit_cast<float>(magnitude);
  const float nearest = (a + aligner) - aligner;
  const float below = nearest - bit_cast<float>(select(nearest > a, bit_cast<uint32_t>(step), 0u));
  const float g8 = 8.0f * bit_cast<float>(bit_cast<uint32_t>(grad) & 0x7fffffffu);
  const bool weak = g8 < bit_cast<float>(bit_cast<uint32_t>(m) & 0x7fffffffu);
  const bool up = stochastic & !weak & (magnitude < 0x7f800000u);
  const uint32_t drawn = magnitude + select(up, noise >> (9 + F::mantissa), 0u);
  const uint32_t normal = select(weak | stochastic, drawn & ~dropped, magnitude);
  return bit_cast<float>(select(a < min_normal, bit_cast<uint32_t>(below), normal) | sign);
}

// Upper bounds of the next amaxes, known before the pass, so that its scales can be too. They are
// at most about one binade loose, and the amax of what the pass stored feeds the next bound. A
// gradient's amax was taken before it was encoded, and rounding to e4m3 or e5m2 may have raised it.
QUAVER_HD float stored_grad_amax(float grad_amax) { return grad_amax * 1.125f; }

QUAVER_HD float exp_avg_bound(const AdamStep& s, float amax, float grad_amax) {
  return s.beta1 * amax + s.one_minus_beta1 * stored_grad_amax(grad_amax);
}
QUAVER_HD float exp_avg_sq_bound(const AdamStep& s, float amax, float grad_amax) {
  const float g = stored_grad_amax(grad_amax);
  return s.beta2 * amax + s.one_minus_beta2 * (g * g);
}
QUAVER_HD float weight_bound(const AdamStep& s, float amax) { return amax + s.update_bound; }

// A state's scale for the values that this step will store; 1 for formats that take none.
QUAVER_HD float next_scale(float finite_max, float bound, float previous) {
  return finite_max > 0.0f ? scale_from_amax(bound, finite_max, true, previous) : 1.0f;
}

}  // namespace quaver
