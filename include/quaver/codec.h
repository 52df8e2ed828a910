// State codecs: how one element of a weight or a moment is stored. Every codec has `bytes`,
// `encode` and `decode`; Adam of each backend is written over them. Tensor-scaled codecs use
// power-of-two scales, so that multiplying by the reciprocal is exact.
#pragma once

#include "quaver/fp8.h"
#include "quaver/scale.h"

namespace quaver {

// One storage format with one scale for the whole tensor. f32 and bf16 have scale 1.
template <class T>
struct TensorCodec {
  using Storage = T;
  static constexpr int bytes = sizeof(T);
  QUAVER_HD float decode(T code, float scale) { return quaver::decode(code) * scale; }
  QUAVER_HD T encode(float x, float inverse_scale) { return encode_nearest<T>(x * inverse_scale); }
};

// The combinations of weight, exp_avg and exp_avg_sq storage that Adam is built for: both backends
// and the check of arguments expand this list. X(weight, exp_avg, exp_avg_sq)
#define QUAVER_ADAM_CODECS(X) \
  X(float, float, float)      \
  X(bf16, float, float)       \
  X(f16, float, float)        \
  X(f16, e4m3, float)         \
  X(f16, float, f16)          \
  X(f16, e4m3, f16)

}  // namespace quaver
