// The loops of simd_adam.cpp, which simd.cpp puts into its table.
#pragma once

#include "spans.h"

namespace quaver::cpu::QUAVER_ISA {

void encode_groups(const StateSpan& state, const void* x, DType type, int64_t n);
void decode_groups(float* out, const StateSpan& state, int64_t n);
// Updates the second moments of subsets begin <= k < end by their sums of squares, and computes
// their rates. The order of a sum depends on nothing but the shape.
void subset_sums(const SubsetSpan& span, int64_t begin, int64_t end);
void adam(const AdamSpan& span, const AdamStep& step, int64_t n, uint32_t amax_bits[3]);

}  // namespace quaver::cpu::QUAVER_ISA
