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

QUAVER_HD Gate tanh_gate(float x) {
  constexpr float k1 = 1.59576912f, k3 = 0.0713548163f;  // 2 sqrt(2 / pi) and 0.044715 times that
  const Sigmoid s = sigmoid(x * fma(k3, x * x, k1));
  const float c = clamp(x, -16.0f, 16.0f);
  return {s.value, c * s.value * s.rest * fma(3.0f * k3, c * c, k1)};
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
  return x * gate<kind>(x).value;
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
