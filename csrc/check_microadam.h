// Checks of micro_adam_'s arguments, the same for every backend.
#pragma once

#include "arguments.h"
#include "quaver/microadam.h"

namespace quaver {

inline void check_ring(const MicroAdamParameter& p, int64_t n) {
  QUAVER_CHECK(p.window >= 1, "micro_adam_: a window must have 1 row or more, got ", p.window);
  const int64_t whole = n / kTopBlock, rest = n % kTopBlock;
  QUAVER_CHECK((whole == 0 && p.kept == 0) || (p.kept >= 1 && p.kept <= kTopBlock),
               "micro_adam_: kept must be in [1, ", kTopBlock, "], and 0 where no block of ",
               kTopBlock, " is whole, got ", p.kept);
  const int64_t last = p.row - whole * p.kept;
  QUAVER_CHECK(last <= rest && (last >= 1 || (rest == 0 && last == 0)), "micro_adam_: a row of ", n,
               " elements keeps ", p.kept, " of each of ", whole, " blocks and 1 to ", rest,
               " of the rest, got ", p.row, " values");
  QUAVER_CHECK(p.row == 0 || (p.index != nullptr && p.value != nullptr),
               "micro_adam_: index and value are needed");
}

inline void check_error_block(int64_t block) {
  constexpr int64_t most = int64_t(1) << 30;
  QUAVER_CHECK(block >= kErrorUnit && block <= most && block % kErrorUnit == 0 &&
                   (is_inside(block) || block > kTopBlock),
               "micro_adam_: error_block must be a power of two from ", kErrorUnit, " to ",
               kTopBlock, ", or a larger multiple of ", kErrorUnit, " up to ", most, ", got ",
               block);
}

inline void check_micro_adam(const MicroAdamParameter& p) {
  const int64_t n = p.weight.numel();
  const DType w = p.weight.dtype;
  QUAVER_CHECK(!is_fp8(w), "micro_adam_: a weight must be f32, f16 or bf16, got ", name_of(w));
  QUAVER_CHECK(p.grad.numel() == n, "micro_adam_: grad has ", p.grad.numel(),
               " values, its parameter ", n);
  check_error_block(p.error_block);
  check_ring(p, n);
  QUAVER_CHECK(n == 0 || (p.error != nullptr && p.range != nullptr),
               "micro_adam_: error and range are needed");
  QUAVER_CHECK(p.remainder.bytes == 0 || w == DType::bf16,
               "micro_adam_: a remainder goes with a bf16 weight, got ", name_of(w));
  QUAVER_CHECK(!p.stochastic || (w != DType::f32 && p.remainder.bytes == 0),
               "micro_adam_: a seed goes with a bf16 or f16 weight without a remainder, got ",
               name_of(w));
  QUAVER_CHECK(p.grad_amax != nullptr && p.step != nullptr && p.hyper != nullptr,
               "micro_adam_: grad_amax, step and hyper are needed");
}

}  // namespace quaver
