// The loops of simd_adam.cpp, which simd.cpp puts into its table.
#pragma once

#include "spans.h"

namespace quaver::cpu::QUAVER_ISA {

void encode_groups(const StateSpan& state, const void* x, DType type, int64_t n);
void decode_groups(float* out, const StateSpan& state, int64_t n);
void adam(const AdamSpan& span, const AdamStep& step, int64_t n, uint32_t amax_bits[3]);

}  // namespace quaver::cpu::QUAVER_ISA
