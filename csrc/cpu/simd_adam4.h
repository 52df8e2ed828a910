// The loops of simd_adam4.cpp, compiled and chosen like those of simd.h.
#pragma once

#include "parallel.h"
#include "quaver/adam4.h"

namespace quaver::cpu {

// One parameter in a step; its pointers are to the first element.
struct Adam4Span {
  Adam4Parameter p;
  AdamStep step;
  Dither dither;
  float grad_scale;
  AtomicAmax* maxima;       // of a rank-1 second moment, as the pass before finds them
  const float* new_maxima;  // then as numbers
};

struct Adam4Simd {
  // Finds the maxima of this step's second moment. `begin` is a multiple of 128. `of_column` has a
  // zero for each column that the n elements meet, min(columns, n).
  void (*find_maxima)(const Adam4Span& span, int64_t begin, int64_t n, int32_t* of_column);
  void (*step)(const Adam4Span& span, int64_t begin, int64_t n);
};

const Adam4Simd& adam4_simd();

}  // namespace quaver::cpu
