// Rotary positions of a head. Compiled once per instruction set as simd.cpp is.
#include "simd_rotate.h"

#include "span.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

constexpr int64_t kPiece = 256;  // values of each half of a head at once

void rotate(void* out, const void* x, DType type, const float* cos, const float* sin, int64_t n,
            bool inverse) {
  alignas(64) float first[kPiece], second[kPiece], low[kPiece], high[kPiece];
  const int64_t half = n / 2;
  const float sign = inverse ? -1.0f : 1.0f;
  for (int64_t i = 0; i < half; i += kPiece) {
    const int64_t count = half - i < kPiece ? half - i : kPiece;
    load_any(first, at(x, type, i), type, count, 1.0f);
    load_any(second, at(x, type, half + i), type, count, 1.0f);
    const float *c = cos + i, *s = sin + i;
    QUAVER_SIMD
    for (int64_t k = 0; k < count; ++k) {
      low[k] = first[k] * c[k] + sign * (second[k] * s[k]);
      high[k] = second[k] * c[half + k] + sign * (first[k] * s[half + k]);
    }
    store_any(at(out, type, i), type, low, count, 1.0f);
    store_any(at(out, type, half + i), type, high, count, 1.0f);
  }
}

}  // namespace

extern const RotateSimd rotate_table;
const RotateSimd rotate_table = {rotate};

}  // namespace quaver::cpu::QUAVER_ISA
