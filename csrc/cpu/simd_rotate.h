// The loops of simd_rotate.cpp, compiled and chosen like those of simd.h.
#pragma once

#include "quaver/rotate.h"

namespace quaver::cpu {

struct RotateSimd {
  // One head of `n` values, of which the first of cos and sin belong to the first.
  void (*rotate)(void* out, const void* x, DType type, const float* cos, const float* sin,
                 int64_t n, bool inverse);
};

const RotateSimd& rotate_simd();

}  // namespace quaver::cpu
