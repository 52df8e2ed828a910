// A warp on a row, for the sums of quaver/normalize.h: lane t of the warp has elements 16 t .. 16 t
// + 15 of each 512, so that the sum's lane 16 t + k is its register k.
#pragma once

#include "fused.h"
#include "quaver/normalize.h"

namespace quaver::cuda {

constexpr int kWarps = kThreads / kWarp;
static_assert(kRowLanes == kWarp * kVector, "a lane of the sum is a register of the warp");

struct RowPlace {
  int64_t row;
  int lane;
};

QUAVER_DEVICE RowPlace row_place() {
  return {int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp, int(threadIdx.x % kWarp)};
}

inline int64_t row_blocks(int64_t rows) { return std::max<int64_t>(1, ceil_div(rows, kWarps)); }

// The tree over all 512 lanes, in every thread of the warp. While threads are added, each hands
// half of its registers over and keeps the other half: 20 exchanges instead of 80.
QUAVER_DEVICE float row_sum(const float (&lanes)[kVector]) {
  float v[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) v[k] = lanes[k];
#pragma unroll
  for (int half = kVector / 2; half > 0; half /= 2) {
    const bool upper = (threadIdx.x & (2 * half)) != 0;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const float mine = upper ? v[k + half] : v[k];
      const float theirs = upper ? v[k] : v[k + half];
      v[k] = mine + __shfl_xor_sync(kAllLanes, theirs, 2 * half);
    }
  }
  v[0] += __shfl_xor_sync(kAllLanes, v[0], 1);
#pragma unroll
  for (int distance = kWarp / 2; distance > 1; distance /= 2)
    v[0] += __shfl_xor_sync(kAllLanes, v[0], distance);
  return v[0];
}

}  // namespace quaver::cuda
