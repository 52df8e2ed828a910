// Checks of the NF4 ops' arguments, the same for every backend.
#pragma once

#include "quaver/nf4.h"

namespace quaver {

inline void check_nf4_block(const char* op, int64_t block) {
  QUAVER_CHECK(block >= kNf4MinBlock && block <= kNf4MaxBlock && (block & (block - 1)) == 0, op,
               ": block must be a power of two from ", kNf4MinBlock, " to ", kNf4MaxBlock, ", got ",
               block);
}

inline void check_nf4(const char* op, const char* name, const Nf4View& v, const TensorView& x) {
  check_nf4_block(op, v.block);
  QUAVER_CHECK(!is_fp8(x.dtype), op, ": ", name, " must be f32, f16 or bf16, got ",
               name_of(x.dtype));
  QUAVER_CHECK(x.numel() == v.numel, op, ": ", name, " must have ", v.numel, " values, got ",
               x.numel());
  QUAVER_CHECK(v.numel == 0 || (v.codes != nullptr && v.absmax != nullptr), op,
               ": codes and absmax are needed");
}

}  // namespace quaver
