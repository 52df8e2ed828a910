// The weights of a span as Adam reads and writes them: under one scale, rounded to nearest or
// stochastically, or bf16 with the low bits of its f32 master beside it.
//
// For simd_adam.cpp only, which is compiled once per instruction set.
#pragma once

#include "remainder.h"
#include "spans.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

inline void load_weight(float* w, const AdamSpan& p, int64_t i, int64_t n) {
  prefetch(at(p.weight.values, p.weight.type, i), n * size_of(p.weight.type));
  if (p.remainder.bytes == 0)
    return load_any(w, at(p.weight.values, p.weight.type, i), p.weight.type, n, p.weight.scale);
  join_masters(w, static_cast<const bf16*>(p.weight.values), p.remainder, i, n);
}

// The starts of the noise of elements i and the following.
inline void dither_starts(uint32_t* __restrict out, const AdamSpan& p, int64_t i, int64_t n) {
  const Dither d = p.dither;
  const uint64_t first = p.first + static_cast<uint64_t>(i);
  const uint32_t low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
  QUAVER_SIMD
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t element = low + static_cast<uint32_t>(j);
    out[j] = dither_start(d, element, high + (element < low));
  }
}

template <class T>
inline void store_stochastic(const AdamSpan& p, int64_t i, const float* w, const uint32_t* starts,
                             int64_t n) {
  const Dither d = p.dither;
  auto* out = static_cast<T*>(p.weight.values) + i;
  const float inverse = 1.0f / p.weight.new_scale;
  QUAVER_SIMD
  for (int64_t j = 0; j < n; ++j)
    out[j] = encode_weight_stochastic<T>(w[j] * inverse, weight_noise(d, starts[j]));
}

inline void store_weight(const AdamSpan& p, int64_t i, const float* w, const uint32_t* starts,
                         int64_t n) {
  if (p.stochastic)
    return p.weight.type == DType::bf16 ? store_stochastic<bf16>(p, i, w, starts, n)
                                        : store_stochastic<f16>(p, i, w, starts, n);
  if (p.remainder.bytes == 0)
    return store_any(at(p.weight.values, p.weight.type, i), p.weight.type, w, n,
                     1.0f / p.weight.new_scale);
  split_masters(static_cast<bf16*>(p.weight.values), p.remainder, w, i, n);
}

}  // namespace
}  // namespace quaver::cpu::QUAVER_ISA
