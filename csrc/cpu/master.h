// A plain weight as an optimizer reads and writes it: f32, 16 bits that round to nearest or
// stochastically, or bf16 with the low bits of its f32 master beside it.
//
// For simd*.cpp only, which are compiled once per instruction set.
#pragma once

#include "quaver/dither.h"
#include "quaver/tensor_view.h"
#include "remainder.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

struct Master {
  TensorView weight;
  Remainder remainder;
  bool stochastic;
  Dither dither;
};

void load_master(float* __restrict w, const Master& m, int64_t begin, int64_t n) {
  if (m.remainder.bytes == 0)
    return load_any(w, at(m.weight.data, m.weight.dtype, begin), m.weight.dtype, n, 1.0f);
  join_masters(w, m.weight.as<bf16>(), m.remainder, begin, n);
}

template <class T>
void store_stochastic(const Master& m, const float* w, int64_t begin, int64_t n) {
  const Dither d = m.dither;
  auto* out = m.weight.as<T>() + begin;
  const auto low = static_cast<uint32_t>(begin), high = static_cast<uint32_t>(begin >> 32);
  QUAVER_SIMD
  for (int64_t j = 0; j < n; ++j) {
    // A run begins at a multiple of its length, so that the lower half of its indices does not
    // wrap.
    const uint32_t start = dither_start(d, low + static_cast<uint32_t>(j), high);
    out[j] = encode_weight_stochastic<T>(w[j], weight_noise(d, start));
  }
}

void store_master(const Master& m, const float* __restrict w, int64_t begin, int64_t n) {
  if (m.stochastic)
    return m.weight.dtype == DType::bf16 ? store_stochastic<bf16>(m, w, begin, n)
                                         : store_stochastic<f16>(m, w, begin, n);
  if (m.remainder.bytes == 0)
    return store_any(at(m.weight.data, m.weight.dtype, begin), m.weight.dtype, w, n, 1.0f);
  split_masters(m.weight.as<bf16>(), m.remainder, w, begin, n);
}

}  // namespace
}  // namespace quaver::cpu::QUAVER_ISA
