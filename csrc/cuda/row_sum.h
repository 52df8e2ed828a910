// A warp on a row, for the sums of quaver/normalize.h: lane t of the warp has elements 16 t .. 16 t
// + 15 of each 512, so that the sum's lane 16 t + k is its register k.
#pragma once

#include "fused_cast.h"
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

// Adds the threads that are 2 * half lanes apart. Each hands half of its 2 * half registers over
// and keeps the other half.
template <int half>
QUAVER_DEVICE void add_threads(float (&v)[kVector]) {
  const bool upper = (threadIdx.x & (2 * half)) != 0;
#pragma unroll
  for (int k = 0; k < half; ++k) {
    const float low = v[k], high = v[k + half];
    const float sent = upper ? low : high;
    v[k] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, sent, 2 * half);
  }
}

// The tree over all 512 lanes, in every thread of the warp, by 20 exchanges instead of the 80 that
// adding the threads of every register would take.
QUAVER_DEVICE float row_sum(float (&lanes)[kVector]) {
  add_threads<8>(lanes);
  add_threads<4>(lanes);
  add_threads<2>(lanes);
  add_threads<1>(lanes);
  float sum = lanes[0];
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
#pragma unroll
  for (int distance = kWarp / 2; distance > 1; distance /= 2)
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

}  // namespace quaver::cuda
