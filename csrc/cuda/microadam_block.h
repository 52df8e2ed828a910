// What one block of threads does for MicroAdam with its 4096 elements, 16 a thread: it finds the
// largest, and reads and writes 4-bit errors.
#pragma once

#include "nibbles.h"
#include "quaver/microadam.h"
#include "runtime_type.h"

namespace quaver::cuda {

static_assert(kTopBlock == kBlockSpan && kErrorUnit == kVector, "a thread has one error's range");

// Places in shared memory, one word free of each 17, so that threads meet in no bank.
constexpr int kPadded = int(kTopBlock) + kThreads;
QUAVER_DEVICE int padded(int place) { return place + place / kVector; }

// The sum of the values of all threads before this one. All threads must call it.
QUAVER_DEVICE uint32_t sum_before(uint32_t value) {
  __shared__ uint32_t warps[kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint32_t sum = value;
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const uint32_t other = __shfl_sync(kAllLanes, sum, lane < d ? lane : lane - d);
    if (lane >= d) sum += other;
  }
  if (lane == kWarp - 1) warps[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += warps[w];
  __syncthreads();  // `warps` may be used again
  return sum - value;
}

// Magnitudes in their order as integers from 1; 0 of an element beyond the tensor.
QUAVER_DEVICE uint32_t key_of(float x, bool inside) { return inside ? order_bits(x) + 1 : 0; }

// Every key above `above` is kept, and the first `ties` that equal it.
struct Threshold {
  uint32_t above;
  uint32_t ties;
};

// Finds the `kept`-th largest key of the block by its digits of 8 bits. All threads must call it.
QUAVER_DEVICE Threshold find_threshold(const float (&a)[kVector], int64_t n, uint32_t kept) {
  __shared__ int32_t histogram[kThreads];
  __shared__ Threshold found;
  Threshold t = {0, kept};
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    histogram[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const uint32_t key = key_of(a[j], j < n);
      const uint32_t upper = shift == 24 ? 0 : key >> (shift + 8);
      if (upper == (shift == 24 ? 0 : t.above >> (shift + 8)))
        atomicAdd(&histogram[key >> shift & 255], 1);
    }
    __syncthreads();
    const auto digit = static_cast<uint32_t>(kThreads - 1 - threadIdx.x);
    const auto count = static_cast<uint32_t>(histogram[digit]);
    const uint32_t before = sum_before(count);
    if (before < t.ties && t.ties <= before + count)
      found = {t.above | digit << shift, t.ties - before};
    __syncthreads();
    t = found;
    __syncthreads();  // `found` may be written again
  }
  return t;
}

// Writes the row of the ring, in the order of places, and leaves in `a` what is not kept.
QUAVER_DEVICE void keep_largest(float (&a)[kVector], int64_t n, int16_t* index, bf16* value,
                                uint32_t kept) {
  const Threshold t = find_threshold(a, n, kept);
  uint32_t counts = 0;  // of keys above in the low half, of ties in the high half
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const uint32_t key = key_of(a[j], j < n);
    counts += uint32_t(key > t.above) + (uint32_t(key == t.above) << 16);
  }
  const uint32_t before = sum_before(counts);
  uint32_t above = before & 0xffffu, ties = before >> 16;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const uint32_t key = key_of(a[j], j < n);
    const bool tie = key == t.above;
    if (key > t.above || (tie && ties < t.ties)) {
      const uint32_t at = above + (ties < t.ties ? ties : t.ties);
      const bf16 stored = encode_nearest<bf16>(a[j]);
      index[at] = static_cast<int16_t>(threadIdx.x * kVector + j);
      value[at] = stored;
      a[j] -= decode(stored);
    }
    above += key > t.above;
    ties += tie;
  }
}

QUAVER_DEVICE Codes encode_codes(const ErrorCodec& codec, const float (&a)[kVector], int64_t n) {
  Codes c = {0, 0};
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (j < n) put_code(c, j, encode_error(codec, a[j]));
  }
  return c;
}

// The range of a thread's values, as unsigned integers that grow with `high` and with -`low`: 0 of
// none, so that memory that was cleared holds no range.
struct Range {
  uint32_t low, high;
};

QUAVER_DEVICE Range range_of(const float (&a)[kVector], int64_t n) {
  Range r = {0, 0};
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (j >= n) continue;
    const uint32_t order = static_cast<uint32_t>(order_of(a[j])) ^ 0x80000000u;
    r = {max_bits(r.low, ~order), max_bits(r.high, order)};
  }
  return r;
}

QUAVER_DEVICE int32_t highest(const Range& r) { return static_cast<int32_t>(r.high ^ 0x80000000u); }
QUAVER_DEVICE bf16 low_of(const Range& r) {
  return range_low(static_cast<int32_t>(~r.low ^ 0x80000000u), highest(r));
}
QUAVER_DEVICE bf16 high_of(const Range& r) { return range_high(highest(r)); }

// The range of the error block that a thread's values belong to, where `threads` make one.
QUAVER_DEVICE Range range_of_block(const Range& mine, int threads) {
  __shared__ Range all[kThreads];
  all[threadIdx.x] = mine;
  __syncthreads();
  Range r = {0, 0};
  const int first = threadIdx.x / threads * threads;
  for (int k = first; k < first + threads; ++k)
    r = {max_bits(r.low, all[k].low), max_bits(r.high, all[k].high)};
  __syncthreads();  // `all` may be used again
  return r;
}

}  // namespace quaver::cuda
