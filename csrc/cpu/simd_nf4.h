// The loops of simd_nf4.cpp, compiled and chosen like those of simd.h.
#pragma once

#include "quaver/nf4.h"

namespace quaver::cpu {

// Spans begin at an even element and at the first of a block.
struct Nf4Simd {
  void (*encode)(const Nf4View& out, const void* x, DType type);
  void (*decode)(void* out, DType type, const Nf4View& x);
};

const Nf4Simd& nf4_simd();

}  // namespace quaver::cpu
