// Sums of squares over subsets (Subset-Norm), compiled once per instruction set as simd.cpp is.
#include "simd_subset.h"

#include <algorithm>

#include "span.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

constexpr uint32_t kMagnitude = 0x7fffffffu;

// The gradient's n values from element i on: in their own memory, if they are f32 without a scale,
// else decoded into `buffer`.
const float* gradient(float* buffer, const SubsetSpan& s, int64_t i, int64_t n) {
  const void* from = at(s.grad, s.grad_type, i);
  const int64_t bytes = n * size_of(s.grad_type);
  prefetch(from, bytes);
  prefetch_far(from, bytes);
  if (s.grad_type == DType::f32 && s.grad_scale == 1.0f) return static_cast<const float*>(from);
  load_any(buffer, from, s.grad_type, n, s.grad_scale);
  return buffer;
}

// Adds the squares of n <= kSubsetLanes values to the sums of as many lanes, whose largest
// magnitudes are in `most`.
inline void add_squares(float* __restrict sums, uint32_t* __restrict most, const float* g,
                        int64_t n) {
  QUAVER_SIMD
  for (int64_t l = 0; l < n; ++l) {
    const uint32_t bits = bit_cast<uint32_t>(g[l]) & kMagnitude;
    sums[l] += g[l] * g[l];
    most[l] = most[l] < bits ? bits : most[l];
  }
}

// The sum of the squares of a piece of n values from `first` on; `most` has each lane's largest
// magnitude so far.
float sum_of_piece(const SubsetSpan& s, int64_t first, int64_t n, uint32_t* most) {
  alignas(64) float sums[kSubsetLanes] = {}, buffer[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = std::min(kBlock, n - i);
    const float* g = gradient(buffer, s, first + i, count);
    int64_t j = 0;
    for (; j + kSubsetLanes <= count; j += kSubsetLanes)
      add_squares(sums, most, g + j, kSubsetLanes);
    add_squares(sums, most, g + j, count - j);
  }
  for (int64_t half = kSubsetLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) sums[l] += sums[l + half];
  return sums[0];
}

uint32_t consecutive(const SubsetSpan& s, int64_t begin, int64_t end) {
  alignas(64) uint32_t most[kSubsetLanes] = {};
  const int64_t width = s.subsets.width;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t n = std::min(width, s.n - k * width);
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i += kSubsetPiece)
      sum += sum_of_piece(s, k * width + i, std::min(kSubsetPiece, n - i), most);
    s.sums[k] = sum;
  }
  return *std::max_element(most, most + kSubsetLanes);
}

// Adds the squares of a row to the sums of its columns; the bits of its largest magnitude.
inline uint32_t add_row(float* __restrict sums, const float* g, int64_t n) {
  uint32_t most = 0;
  _Pragma("omp simd reduction(max : most)") for (int64_t j = 0; j < n; ++j) {
    const uint32_t bits = bit_cast<uint32_t>(g[j]) & kMagnitude;
    sums[j] += g[j] * g[j];
    most = most < bits ? bits : most;
  }
  return most;
}

uint32_t strided(const SubsetSpan& s, int64_t begin, int64_t end) {
  alignas(64) float sums[kBlock], piece[kBlock], buffer[kBlock];
  const int64_t width = s.subsets.width, rows = s.n / width;
  uint32_t most = 0;
  for (int64_t k = begin; k < end; k += kBlock) {
    const int64_t count = std::min(kBlock, end - k);
    std::fill_n(sums, count, 0.0f);
    for (int64_t first = 0; first < rows; first += kStridedPiece) {
      std::fill_n(piece, count, 0.0f);
      for (int64_t row = first; row < std::min(rows, first + kStridedPiece); ++row) {
        const uint32_t seen = add_row(piece, gradient(buffer, s, row * width + k, count), count);
        most = most < seen ? seen : most;
      }
      QUAVER_SIMD
      for (int64_t j = 0; j < count; ++j) sums[j] += piece[j];
    }
    std::copy_n(sums, count, s.sums + k);
  }
  return most;
}

}  // namespace

uint32_t subset_sums(const SubsetSpan& span, int64_t begin, int64_t end) {
  return span.subsets.strided ? strided(span, begin, end) : consecutive(span, begin, end);
}

}  // namespace quaver::cpu::QUAVER_ISA
