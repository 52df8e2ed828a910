// Checks of adam_4bit_'s arguments, the same for every backend.
#pragma once

#include "arguments.h"
#include "quaver/adam4.h"

namespace quaver {

inline void check_adam4(const Adam4Parameter& p) {
  const int64_t n = p.weight.numel();
  const DType w = p.weight.dtype;
  QUAVER_CHECK(!is_fp8(w), "adam_4bit_: a weight must be f32, f16 or bf16, got ", name_of(w));
  QUAVER_CHECK(p.grad.numel() == n, "adam_4bit_: grad has ", p.grad.numel(),
               " values, its parameter ", n);
  QUAVER_CHECK(p.second == Second::block || p.shape.axes >= 2,
               "adam_4bit_: a rank-1 or factored second moment needs 2 axes or more, got ",
               p.shape.axes);
  QUAVER_CHECK(n == 0 || (p.exp_avg != nullptr && p.exp_avg_scale != nullptr &&
                          p.exp_avg_sq_scale != nullptr),
               "adam_4bit_: exp_avg and both scales are needed");
  QUAVER_CHECK(n == 0 || (p.exp_avg_sq == nullptr) == (p.second == Second::factor),
               "adam_4bit_: exp_avg_sq has codes, unless it is factored");
  QUAVER_CHECK(p.remainder.bytes == 0 || w == DType::bf16,
               "adam_4bit_: a remainder goes with a bf16 weight, got ", name_of(w));
  QUAVER_CHECK(!p.stochastic || (w != DType::f32 && p.remainder.bytes == 0),
               "adam_4bit_: a seed goes with a bf16 or f16 weight without a remainder, got ",
               name_of(w));
  QUAVER_CHECK(p.grad_amax != nullptr && p.step != nullptr && p.hyper != nullptr,
               "adam_4bit_: grad_amax, step and hyper are needed");
}

}  // namespace quaver
