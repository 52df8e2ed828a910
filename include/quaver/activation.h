// The activations of gated MLPs, one element at a time. All three are f(x) = x * G(x) with a gate G
// between 0 and 1: the sigmoid (SiLU, arXiv 1702.03118), the normal distribution (GELU, arXiv
// 1606.08415, section 2) and its tanh approximation there, which is sigmoid(2u) because
// (1 + tanh u) / 2 = sigmoid(2u).
//
// Non-finite inputs stay visible: f(-inf) = -inf * 0 is NaN, as in torch, and f(inf) = inf.
// Accuracy is stated here and tested in tests/cpp/test_activation.cpp.
#pragma once

#include "quaver/math.h"

namespace quaver {

enum class Activation : int8_t { silu, gelu, gelu_tanh };

struct Gate {
  float value;  // G(x)
  float slope;  // x * G'(x)
};

// 1 / (1 + e^-x) within 4 ulp, 0 below -88.7; and 1 minus it, without cancellation.
struct Sigmoid {
  float value, rest;
};

QUAVER_HD Sigmoid sigmoid(float x) {
  const float e = exp(-x);
  const float s = 1.0f / (1.0f + e);
  const uint32_t rest = select(x > 0.0f, bit_cast<uint32_t>(e * s), bit_cast<uint32_t>(1.0f - s));
  return {s, bit_cast<float>(rest)};
}

// The sigmoid's value alone, the same bits, for what is multiplied by x: of NaN it is any number.
// Where e^-x is far below 1 it is of no account, so that it needs no case for zero.
QUAVER_HD float sigmoid_value(float x) {
  constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  // exp(-c) of math.h, every sign turned instead of x's.
  const float c = at_most(at_least(x, -89.0f), 87.0f);
  const float shifted = fma(c, -1.44269504f, to_integer);
  const float n = shifted - to_integer;
  const float r = fma(n, ln2_low, fma(n, ln2_high, c));
  float p = -1.98412698e-4f;
  p = fma(p, r, 1.38888889e-3f);
  p = fma(p, r, -8.33333333e-3f);
  p = fma(p, r, 4.16666667e-2f);
  p = fma(p, r, -1.66666667e-1f);
  p = fma(p, r, 0.5f);
  p = fma(p, r, -1.0f);
  p = fma(p, r, 1.0f);
  // times 2^n, which may be infinity
  const uint32_t product = bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(shifted) << 23);
  const uint32_t e = product < 0x7f800000u ? product : 0x7f800000u;
  return 1.0f / (1.0f + bit_cast<float>(e));
}

// The normal distribution function Phi within 8 ulp on both sides (0 below -13.2), and x times its
// density.
QUAVER_HD Gate normal_gate(float x) {
  const float c = clamp(x, -16.0f, 16.0f);
  const float square = c * c;
  const float rest = fma(c, c, -square);  // what the rounding of c * c lost
  float density = exp(-0.5f * square);
  density = fma(density, -0.5f * rest, density);
  const float a = c < 0.0f ? -c : c;
  // Phi(-a) = e^(-a^2/2) Q(t): a polynomial fitted to a relative error of 6e-8 for 0 <= a <= 13.5.
  const float t = 1.0f / fma(0.3f, a, 1.0f);
  float p = 0.0383343666f;
  p = fma(p, t, -0.168952606f);
  p = fma(p, t, 0.22821858f);
  p = fma(p, t, -0.0760009697f);
  p = fma(p, t, 0.142185949f);
  p = fma(p, t, 0.0948326247f);
  p = fma(p, t, 0.121882138f);
  p = fma(p, t, 0.119493053f);
  p = fma(p, t, 6.85348968e-6f);
  const float tail = density * p;
  const uint32_t value =
      select(c > 0.0f, bit_cast<uint32_t>(1.0f - tail), bit_cast<uint32_t>(tail));
  return {bit_cast<float>(value), c * (density * 0.398942280f)};
}

// Far out a gate is 0 or 1 and has no slope: the clamps keep 0 * inf out of it.
QUAVER_HD Gate sigmoid_gate(float x) {
  const Sigmoid s = sigmoid(x);
  return {s.value, clamp(x, -128.0f, 128.0f) * s.value * s.rest};
}

// 2 sqrt(2 / pi) and 0.044715 times that
constexpr float kTanhLinear = 1.59576912f, kTanhCubic = 0.0713548163f;

// Of which tanh_gate is the sigmoid.
QUAVER_HD float tanh_argument(float x) { return x * fma(kTanhCubic, x * x, kTanhLinear); }

QUAVER_HD Gate tanh_gate(float x) {
  const Sigmoid s = sigmoid(tanh_argument(x));
  const float c = clamp(x, -16.0f, 16.0f);
  return {s.value, c * s.value * s.rest * fma(3.0f * kTanhCubic, c * c, kTanhLinear)};
}

template <Activation kind>
QUAVER_HD Gate gate(float x) {
  if constexpr (kind == Activation::silu) return sigmoid_gate(x);
  if constexpr (kind == Activation::gelu) return normal_gate(x);
  if constexpr (kind == Activation::gelu_tanh) return tanh_gate(x);
}

// f(x)
template <Activation kind>
QUAVER_HD float activate(float x) {
  if constexpr (kind == Activation::silu) return x * sigmoid_value(x);
  if constexpr (kind == Activation::gelu) return x * normal_gate(x).value;
  if constexpr (kind == Activation::gelu_tanh) return x * sigmoid_value(tanh_argument(x));
}

// f'(x) = G(x) + x * G'(x)
template <Activation kind>
QUAVER_HD float activation_slope(float x) {
  const Gate g = gate<kind>(x);
  return g.value + g.slope;
}

struct Gradients {
  float x, up;
};

// The gradients of f(x) * up, for its own gradient g.
template <Activation kind>
QUAVER_HD Gradients activation_gradients(float g, float x, float up) {
  const Gate of = gate<kind>(x);
  return {g * up * (of.value + of.slope), g * (x * of.value)};
}

}  // namespace quaver
