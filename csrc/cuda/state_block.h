// States in groups of 128 elements: a warp holds one group, four elements a lane. The arithmetic is
// quaver/codec.h's and quaver/adam.h's.
#pragma once

#include "quaver/adam.h"
#include "quaver/codec.h"
#include "runtime_type.h"

namespace quaver::cuda {

static_assert(kGroup == kWarp * kQuad, "a warp holds a group");

// log2_of_code of both formats, in shared memory.
struct Logarithms {
  float of[2][128];
};

// Fills the table; all threads of the block call it, and synchronise before the first use.
QUAVER_DEVICE void fill(Logarithms& t, int thread) {
  static_assert(kThreads == 256, "one entry for each thread");
  const uint32_t code = thread % 128;
  t.of[thread / 128][code] = thread < 128 ? log2_of_code<e4m3>(code) : log2_of_code<e5m2>(code);
}

// The values of four expanded codes.
QUAVER_DEVICE void decode_expanded(DType type, const AnyQuad& v, float scale, const Logarithms& t,
                                   float (&x)[kQuad]) {
  const float inverse = 1.0f / power_of(scale);
  const uint32_t max_code = type == DType::e4m3 ? Format<e4m3>::max_code : Format<e5m2>::max_code;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const uint32_t code = v.word[0] >> 8 * j & 0xff, magnitude = code & 0x7f;
    const float a = contract(magnitude, max_code, t.of[type != DType::e4m3][magnitude], inverse);
    x[j] = bit_cast<float>(bit_cast<uint32_t>(a) | (code & 0x80) << 24) * scale;
  }
}

// The scale of the warp's group, in every lane. Elements beyond the edge must be zero.
QUAVER_DEVICE float scale_of_warp(DType type, bool expand, const float (&x)[kQuad]) {
  uint32_t most = 0, least = 0xffffffffu;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const uint32_t bits = range_bits(x[j]);
    most = max_bits(most, bits);
    least = bits - 1u < least ? bits - 1u : least;
  }
  GroupRange range;
  range.most = __reduce_max_sync(kAllLanes, most);
  range.least = ~__reduce_max_sync(kAllLanes, ~least);
  return type == DType::e4m3 ? group_scale<e4m3>(expand, range) : group_scale<e5m2>(expand, range);
}

// Computes y, the values x in the format's domain, which are then rounded to codes.
QUAVER_DEVICE void to_format(DType type, bool expands, float scale, const float (&x)[kQuad],
                             float (&y)[kQuad]) {
  if (!expands) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) y[j] = x[j] / scale;
    return;
  }
  const Expander e = type == DType::e4m3 ? expander<e4m3>(scale) : expander<e5m2>(scale);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) y[j] = expand(e, x[j]);
}

template <class T>
QUAVER_DEVICE void settle_first(const float (&m)[kQuad], const float (&grad)[kQuad],
                                bool stochastic, const uint32_t (&random)[kQuad],
                                float (&y)[kQuad]) {
#pragma unroll
  for (int j = 0; j < kQuad; ++j)
    y[j] = settle_exp_avg<T>(y[j], m[j], grad[j], stochastic, random[j]);
}

QUAVER_DEVICE void settle_first(DType type, const float (&m)[kQuad], const float (&grad)[kQuad],
                                bool stochastic, const uint32_t (&random)[kQuad],
                                float (&y)[kQuad]) {
  switch (type) {
    case DType::e4m3: settle_first<e4m3>(m, grad, stochastic, random, y); break;
    case DType::e5m2: settle_first<e5m2>(m, grad, stochastic, random, y); break;
    case DType::f16: settle_first<f16>(m, grad, stochastic, random, y); break;
    default: break;
  }
}

QUAVER_DEVICE void keep_nonzero(DType type, const float (&x)[kQuad], float (&y)[kQuad]) {
#pragma unroll
  for (int j = 0; j < kQuad; ++j)
    y[j] = type == DType::e4m3 ? quaver::keep_nonzero<e4m3>(y[j], x[j])
                               : quaver::keep_nonzero<e5m2>(y[j], x[j]);
}

}  // namespace quaver::cuda
