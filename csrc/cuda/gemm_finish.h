// What the epilogues of all matrix products compute of an element's sum, so that kernels of every
// GPU round the same numbers.
#pragma once

#include "vector.h"

namespace quaver::cuda {

// The scales are multiplied first: each may be near a limit of f32 where their product is not.
QUAVER_DEVICE float finish_sum(float sum, float scale_a, float scale_b, float bias) {
  return sum * (scale_a * scale_b) + bias;
}

QUAVER_DEVICE float divide_one(float x, Divisor d) {
  return d.divide ? x / d.factor : x * d.factor;
}

}  // namespace quaver::cuda
