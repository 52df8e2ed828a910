// Elementary functions whose bits depend on no libm: IEEE add, mul, div and fma only, so every host
// and device agrees. Accuracy is stated and tested in tests/cpp/test_math.cpp.
#pragma once

#include <cmath>

#include "quaver/dtype.h"

namespace quaver {

QUAVER_HD float fma(float a, float b, float c) { return ::fmaf(a, b, c); }

// 2^x within 2 ulp for x in [-126, 128); 0 below that, infinity from 128 on. NaN stays NaN.
QUAVER_HD float exp2(float x) {
  if (!(x >= -126.0f)) return x < -126.0f ? 0.0f : x;
  if (x >= 128.0f) return bit_cast<float>(0x7f800000u);
  constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const float shifted = x + to_integer;
  const int32_t n = bit_cast<int32_t>(shifted) - bit_cast<int32_t>(to_integer);
  const float f = x - (shifted - to_integer);  // exact, |f| <= 1/2
  // Taylor series of 2^f: ln(2)^k / k!; the first term left out is below 6e-9.
  float p = 1.52527338e-5f;
  p = fma(p, f, 1.54035304e-4f);
  p = fma(p, f, 1.33335581e-3f);
  p = fma(p, f, 9.61812911e-3f);
  p = fma(p, f, 5.55041087e-2f);
  p = fma(p, f, 2.40226507e-1f);
  p = fma(p, f, 6.93147181e-1f);
  p = fma(p, f, 1.0f);
  // Two factors, because n may be 128 (p < 1) or -126 (p >= 1/sqrt(2) still normal or rounded).
  const int32_t half = n / 2;
  return p * bit_cast<float>((half + 127) << 23) * bit_cast<float>((n - half + 127) << 23);
}

// x between `low` and `high`; NaN stays NaN. By bits, so that loops around it vectorise.
QUAVER_HD float clamp(float x, float low, float high) {
  const uint32_t raised = select(x < low, bit_cast<uint32_t>(low), bit_cast<uint32_t>(x));
  return bit_cast<float>(select(x > high, bit_cast<uint32_t>(high), raised));
}

// The larger and the smaller of x and a bound that is not zero; of NaN the bound. One instruction
// each, which compilers do not find in a comparison on every machine.
QUAVER_HD float at_least(float x, float low) {
#if defined(__CUDA_ARCH__)
  return ::fmaxf(x, low);
#else
  return x > low ? x : low;
#endif
}

QUAVER_HD float at_most(float x, float high) {
#if defined(__CUDA_ARCH__)
  return ::fminf(x, high);
#else
  return x < high ? x : high;
#endif
}

// e^x within 2 ulp; 0 where that is no normal float (below -87.336), infinity above 88.73. NaN
// stays NaN. Without a branch, so that loops around it vectorise.
QUAVER_HD float exp(float x) {
  constexpr float lowest = -87.3365448f;  // the smallest normal float's logarithm
  constexpr float to_integer = 12582912.0f;
  // ln 2 in two parts: the first has few bits, so that n times it is exact.
  constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  const float c = clamp(x, lowest, 89.0f);
  const float shifted = fma(c, 1.44269504f, to_integer);
  const float n = shifted - to_integer;
  const float r = fma(n, -ln2_low, fma(n, -ln2_high, c));  // |r| <= ln(2) / 2
  // Taylor series; the first term left out is below 6e-9.
  float p = 1.98412698e-4f;
  p = fma(p, r, 1.38888889e-3f);
  p = fma(p, r, 8.33333333e-3f);
  p = fma(p, r, 4.16666667e-2f);
  p = fma(p, r, 1.66666667e-1f);
  p = fma(p, r, 0.5f);
  p = fma(p, r, 1.0f);
  p = fma(p, r, 1.0f);
  // 2^n in two factors, because n may be 128.
  const uint32_t exponent = bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(to_integer) + 254u;
  const uint32_t half = exponent >> 1;
  const float result = p * bit_cast<float>(half << 23) * bit_cast<float>((exponent - half) << 23);
  return bit_cast<float>(select(x < lowest, 0u, bit_cast<uint32_t>(result)));
}

// log2(x) within 2 ulp or 1.2e-7 absolute for normal x > 0. Zero gives -infinity, negative and NaN
// give NaN; subnormals are scaled first.
QUAVER_HD float log2(float x) {
  if (!(x > 0.0f)) return x == 0.0f ? bit_cast<float>(0xff800000u) : bit_cast<float>(0x7fc00000u);
  if (x == bit_cast<float>(0x7f800000u)) return x;
  float exponent = 0.0f;
  if (x < 1.17549435e-38f) {
    x *= 16777216.0f;
    exponent = -24.0f;
  }
  // m in [sqrt(1/2), sqrt(2)), x = m * 2^e.
  const uint32_t bits = bit_cast<uint32_t>(x) - 0x3f3504f3u;
  exponent += static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float m = bit_cast<float>((bits & 0x7fffffu) + 0x3f3504f3u);
  // log(m) = 2 atanh(t), t = (m - 1) / (m + 1), |t| < 0.1716.
  const float t = (m - 1.0f) / (m + 1.0f);
  const float s = t * t;
  float p = 3.2059889e-1f;  // 2 / (9 ln 2), 2 / (7 ln 2), ...
  p = fma(p, s, 4.1219859e-1f);
  p = fma(p, s, 5.7707802e-1f);
  p = fma(p, s, 9.6179669e-1f);
  p = fma(p, s, 2.8853901f);
  return fma(p, t, exponent);
}

// base^n for n >= 0 by repeated squaring: the same f64 products in the same order everywhere.
QUAVER_HD double integer_power(double base, int64_t n) {
  double result = 1.0;
  for (; n > 0; n >>= 1) {
    if (n & 1) result *= base;
    base *= base;
  }
  return result;
}

}  // namespace quaver
