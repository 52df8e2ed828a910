// The vector loops of simd.h that add, in simd_sum.cpp.
#pragma once

#include "spans.h"

namespace quaver::cpu::QUAVER_ISA {

uint32_t add(void* out, DType out_type, float scale, const void* a, DType a_type, float scale_a,
             const void* b, DType b_type, float scale_b, int64_t n);
uint32_t sum_shards(void* out, DType out_type, float sum_scale, const ShardSpan& shards, int64_t n,
                    int32_t* at_max);
double sum_squares(const void* x, DType type, int64_t n, uint32_t* amax);

}  // namespace quaver::cpu::QUAVER_ISA
