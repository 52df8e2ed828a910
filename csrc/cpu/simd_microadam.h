// The loop of simd_microadam.cpp over one block, compiled and chosen like those of simd.h.
#pragma once

#include "quaver/microadam.h"

namespace quaver::cpu {

// The smallest and largest value, as order_of has them.
struct OrderRange {
  int32_t low = kMostOrder, high = kLeastOrder;
};

// One parameter in a step; its pointers are to the first element.
struct MicroAdamSpan {
  MicroAdamParameter p;
  MicroAdamStep step;
  Dither dither;
  float grad_scale;
  OrderRange* partial;  // where error blocks cross top blocks: two of each top block
  const bf16* range;    // low and high of each error block, to be stored
};

// The parts of a step: those before the ranges of the errors are known, those after, or both.
enum class MicroAdamPart { keep, store, all };

struct MicroAdamSimd {
  void (*block)(const MicroAdamSpan& span, int64_t block, MicroAdamPart part);
};

const MicroAdamSimd& micro_adam_simd();

}  // namespace quaver::cpu
