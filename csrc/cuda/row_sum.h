// A warp on a row, for the sums of quaver/normalize.h: of each 512 elements a thread of the warp
// has runs (runs.h), so that the sum's lane is an element's place among the 512.
#pragma once

#include "fused_cast.h"
#include "quaver/normalize.h"

namespace quaver::cuda {

constexpr int kWarps = kThreads / kWarp;
static_assert(kRowLanes == kWarp * kVector, "a lane of the sum is a register of the warp");

// The distance between a thread's runs.
template <int kRun>
constexpr int kRowRunsApart = kWarp * kRun;

struct RowPlace {
  int64_t row;
  int lane;
};

QUAVER_DEVICE RowPlace row_place() {
  return {int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp, int(threadIdx.x % kWarp)};
}

inline int64_t row_blocks(int64_t rows) { return std::max<int64_t>(1, ceil_div(rows, kWarps)); }

// Adds threads that are kHalf * kUnit apart, then half as far. Each hands half of its 2 * kHalf
// registers over and keeps the other half.
template <int kHalf, int kUnit>
QUAVER_DEVICE void add_threads(float (&v)[kVector]) {
  if constexpr (kHalf > 0) {
    const bool upper = (threadIdx.x & (kHalf * kUnit)) != 0;
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      const float low = v[k], high = v[k + kHalf];
      const float sent = upper ? low : high;
      v[k] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, sent, kHalf * kUnit);
    }
    add_threads<kHalf / 2, kUnit>(v);
  }
}

// Adds registers that are kHalf apart, then half as far, down to kLeast.
template <int kHalf, int kLeast>
QUAVER_DEVICE void add_registers(float (&v)[kVector]) {
  if constexpr (kHalf >= kLeast) {
#pragma unroll
    for (int k = 0; k < kHalf; ++k) v[k] += v[k + kHalf];
    add_registers<kHalf / 2, kLeast>(v);
  }
}

// The tree over all 512 lanes, in every thread of the warp. Runs are the upper bits of a lane, so
// they are added first; then threads, in fewer exchanges than each register would take for itself,
// because the places within a run come to lie in threads too, which are added last.
template <int kRun>
QUAVER_DEVICE float row_sum(float (&lanes)[kVector]) {
  constexpr int kUnit = kWarp / kRun;
  add_registers<kVector / 2, kRun>(lanes);
  add_threads<kRun / 2, kUnit>(lanes);
  float sum = lanes[0];
#pragma unroll
  for (int distance = kUnit / 2; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
#pragma unroll
  for (int distance = kWarp / 2; distance >= kUnit; distance /= 2)
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

}  // namespace quaver::cuda
