// Spans of f32 masters from bf16 weights with their further bits, and back.
//
// For simd*.cpp only, which are compiled once per instruction set.
#pragma once

#include "span.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

template <class Low>
inline void join(float* __restrict w, const bf16* high, const Low* low, int64_t n) {
  prefetch(low, n * int64_t(sizeof(Low)));
  QUAVER_SIMD
  for (int64_t j = 0; j < n; ++j) w[j] = join_master(high[j], low[j]);
}

template <class Low>
inline void split(bf16* high, Low* low, const float* __restrict w, int64_t n) {
  QUAVER_SIMD
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t bits = master_bits<Low>(w[j]);
    high[j] = master_high(bits);
    low[j] = master_low<Low>(bits);
  }
}

inline void join_masters(float* w, const bf16* high, const Remainder& r, int64_t i, int64_t n) {
  if (r.bytes == 1) return join(w, high + i, static_cast<const uint8_t*>(r.data) + i, n);
  join(w, high + i, static_cast<const uint16_t*>(r.data) + i, n);
}

inline void split_masters(bf16* high, const Remainder& r, const float* w, int64_t i, int64_t n) {
  if (r.bytes == 1) return split(high + i, static_cast<uint8_t*>(r.data) + i, w, n);
  split(high + i, static_cast<uint16_t*>(r.data) + i, w, n);
}

}  // namespace
}  // namespace quaver::cpu::QUAVER_ISA
