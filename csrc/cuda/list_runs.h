// Runs of a thread's elements (runs.h) in lists of tensors: in those whose type is a run-time
// value, and in buckets.
#pragma once

#include "runs.h"
#include "runtime_type.h"

namespace quaver::cuda {

// load_runs of fours: what 16 bytes of the widest type hold.
QUAVER_DEVICE AnyPacked load_any_fours(const void* p, DType type, int64_t i, int64_t apart,
                                       int64_t n, bool aligned) {
  AnyPacked v = {};
  if (size_of(type) == 4)
    return load_runs<kQuad>(static_cast<const float*>(p) + i, apart, n, aligned);
  if (size_of(type) == 2) {
    const auto halves = load_runs<kQuad>(static_cast<const bf16*>(p) + i, apart, n, aligned);
#pragma unroll
    for (int w = 0; w < kVector / 2; ++w) v.word[w] = halves.word[w];
    return v;
  }
  const auto bytes = load_runs<kQuad>(static_cast<const e4m3*>(p) + i, apart, n, aligned);
#pragma unroll
  for (int w = 0; w < kVector / 4; ++w) v.word[w] = bytes.word[w];
  return v;
}

// store_runs into an aligned bucket: a tensor's part is a multiple of 16 elements, so that each run
// is whole. The first is there.
template <int kRun, class T>
QUAVER_DEVICE void store_whole_runs(T* to, const Packed<sizeof(T)>& v, int64_t apart, int64_t n) {
  constexpr int kWords = kRun * int(sizeof(T)) / 4;
#pragma unroll
  for (int r = 0; r < kVector / kRun; ++r)
    if (r == 0 || r * apart < n) store_at_once<kWords>(to + r * apart, v.word + r * kWords);
}

}  // namespace quaver::cuda
