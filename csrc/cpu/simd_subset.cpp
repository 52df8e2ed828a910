// The second moments of subsets (Subset-Norm), compiled once per instruction set as simd.cpp is.
#include <algorithm>

#include "simd_adam.h"
#include "span.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

// The gradient's values from element i on, at least up to a multiple of kPartialSums past n, the
// rest of it zero: in `buffer`, or where they lie.
const float* gradient(float* buffer, const SubsetSpan& s, int64_t i, int64_t n) {
  const void* from = at(s.grad, s.grad_type, i);
  prefetch(from, n * size_of(s.grad_type));
  if (s.grad_type == DType::f32 && s.grad_scale == 1.0f && n % kPartialSums == 0)
    return static_cast<const float*>(from);
  load_any(buffer, from, s.grad_type, n, s.grad_scale);
  for (int64_t j = n; j % kPartialSums != 0; ++j) buffer[j] = 0.0f;
  return buffer;
}

// The sum of squares of n consecutive values from `first`: kPartialSums sums by turns, then halves
// added to halves.
float sum_of_squares(const SubsetSpan& s, int64_t first, int64_t n) {
  alignas(64) float sums[kPartialSums] = {}, buffer[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = std::min(kBlock, n - i);
    const float* g = gradient(buffer, s, first + i, count);
    for (int64_t j = 0; j < count; j += kPartialSums) {
      QUAVER_SIMD
      for (int64_t l = 0; l < kPartialSums; ++l) sums[l] += g[j + l] * g[j + l];
    }
  }
  for (int64_t half = kPartialSums / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) sums[l] += sums[l + half];
  return sums[0];
}

}  // namespace

void subset_sums(const SubsetSpan& span, int64_t begin, int64_t end) {
  const SubsetSpan s = span;
  const int64_t width = s.subsets.width;
  if (!s.subsets.strided) {
    for (int64_t k = begin; k < end; ++k) {
      const float sum = sum_of_squares(s, k * width, std::min(width, s.n - k * width));
      s.values[k] = s.step.beta2 * s.values[k] + s.step.one_minus_beta2 * sum;
      s.rates[k] = subset_rate(s.step, s.values[k]);
    }
    return;
  }
  alignas(64) float sums[kBlock], buffer[kBlock];
  for (int64_t k = begin; k < end; k += kBlock) {
    const int64_t count = std::min(kBlock, end - k);
    std::fill_n(sums, count, 0.0f);
    for (int64_t row = 0; row < s.n; row += width) {
      const float* g = gradient(buffer, s, row + k, count);
      QUAVER_SIMD
      for (int64_t j = 0; j < count; ++j) sums[j] += g[j] * g[j];
    }
    QUAVER_SIMD
    for (int64_t j = 0; j < count; ++j) {
      s.values[k + j] = s.step.beta2 * s.values[k + j] + s.step.one_minus_beta2 * sums[j];
      s.rates[k + j] = subset_rate(s.step, s.values[k + j]);
    }
  }
}

}  // namespace quaver::cpu::QUAVER_ISA
