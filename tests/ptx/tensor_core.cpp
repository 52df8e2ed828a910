#include "tensor_core.h"

#include <algorithm>
#include <cmath>

#include "formats.h"

namespace quaver::ptx {

const float* fp8_values(bool e5m2) {
  struct Tables {
    float values[2][256];
    Tables() {
      for (uint32_t code = 0; code < 256; ++code) {
        values[0][code] = decode(code, kE4M3);
        values[1][code] = decode(code, kE5M2);
      }
    }
  };
  static const Tables tables;
  return tables.values[e5m2];
}

void add_exact(float* sums, const float* a, const float (&b)[kProductDepth][kProductColumns],
               int columns) {
  double exact[kProductColumns];
  for (int j = 0; j < columns; ++j) exact[j] = double(sums[j]);
  for (int k = 0; k < kProductDepth; ++k)
    for (int j = 0; j < columns; ++j) exact[j] += double(a[k]) * double(b[k][j]);
  for (int j = 0; j < columns; ++j) sums[j] = static_cast<float>(exact[j]);
}

void add_cut(float* sums, const float* a, const float (&b)[kProductDepth][kProductColumns],
             int columns) {
  constexpr int kBits = 13;
  for (int j = 0; j < columns; ++j) {
    float largest = std::fabs(sums[j]);
    for (int k = 0; k < kProductDepth; ++k) largest = std::max(largest, std::fabs(a[k] * b[k][j]));
    if (!(largest > 0) || std::isinf(largest)) {  // there is nothing to cut
      for (int k = 0; k < kProductDepth; ++k) sums[j] += a[k] * b[k][j];
      continue;
    }
    const double unit = std::ldexp(1.0, std::ilogb(largest) - kBits), inverse = 1 / unit;
    double sum = std::trunc(double(sums[j]) * inverse);
    for (int k = 0; k < kProductDepth; ++k)
      sum += std::trunc(double(a[k]) * double(b[k][j]) * inverse);
    sums[j] = static_cast<float>(sum * unit);
  }
}

}  // namespace quaver::ptx
