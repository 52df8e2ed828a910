// The loop of simd_subset.cpp, which simd.cpp puts into its table.
#pragma once

#include "spans.h"

namespace quaver::cpu::QUAVER_ISA {

// Sums the squares of subsets begin <= k < end; the bits of their largest magnitude.
uint32_t subset_sums(const SubsetSpan& span, int64_t begin, int64_t end);

}  // namespace quaver::cpu::QUAVER_ISA
