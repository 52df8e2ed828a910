// Four elements of a parameter as adam.cu's kernels hold them: what is loaded of them, their
// values, and the codes of their weights.
#pragma once

#include "adam_quick.h"

namespace quaver::cuda {

struct Loaded {
  AnyQuad state[kStates], grad, remainder;
  float scale[kStates];  // decode
  int64_t i, n;          // first element, and how many are left of its row or tensor
};

QUAVER_DEVICE Loaded load_elements(const Entry& e, const Plan& p, int64_t i, int64_t n) {
  Loaded l;
  l.i = i;
  l.n = n;
#pragma unroll
  for (int k = 0; k < kStates; ++k) {
    const State& s = e.state[k];
    const bool shared = k == 2 && e.rates != nullptr;
    l.state[k] = load_quad(s.values, s.type, i, shared ? 0 : n, e.aligned, e.whole);
    l.scale[k] = s.scaling == Scaling::tensor ? p.scale[k] : n > 0 ? s.scale[i / kGroup] : 1.0f;
  }
  l.grad = load_quad(e.grad, e.grad_type, i, n, e.aligned, e.whole);
  if (e.remainder.bytes != 0)
    l.remainder =
        load_quad(e.remainder.data, remainder_type(e.remainder), i, n, e.aligned, e.whole);
  return l;
}

// The rates of four elements, each its subset's.
QUAVER_DEVICE void load_rates(const Entry& e, int64_t i, int64_t n, float (&rate)[kQuad]) {
  const int64_t width = e.subsets.width;
  int64_t subset = i / width, inside = i - subset * width;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    rate[j] = j < n ? e.rates[e.subsets.strided ? inside : subset] : 0.0f;
    if (++inside < width) continue;
    inside = 0;
    ++subset;
  }
}

QUAVER_DEVICE void decode_state(const State& s, const AnyQuad& v, float scale,
                                const Logarithms& logarithms, float (&x)[kQuad]) {
  if (s.scaling == Scaling::expand)
    decode_expanded(s.type, v, scale, logarithms, x);
  else
    decode_any(s.type, v, 0, scale, x);
}

QUAVER_DEVICE void decode_weight(const Entry& e, const Loaded& l, float (&w)[kQuad]) {
  if (e.remainder.bytes == 0) return decode_any(e.state[0].type, l.state[0], 0, l.scale[0], w);
#pragma unroll
  for (int j = 0; j < kQuad; ++j)
    w[j] = join_master(bf16{static_cast<uint16_t>(half_of(l.state[0], j))},
                       low_of(e.remainder, l.remainder, j));
}

template <class T>
QUAVER_DEVICE void encode_stochastic(const Plan& p, const float (&w)[kQuad],
                                     const uint32_t (&start)[kQuad], Loaded& l) {
#pragma unroll
  for (int j = 0; j < kQuad; ++j)
    put_half(
        l.state[0], j,
        encode_weight_stochastic<T>(w[j] * p.inverse[0], weight_noise(p.dither, start[j])).bits);
}

QUAVER_DEVICE void encode_weight(const Entry& e, const Plan& p, const float (&w)[kQuad],
                                 const uint32_t (&start)[kQuad], Loaded& l) {
  if (e.remainder.bytes != 0) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j)
      put_half(l.state[0], j, put_low(e.remainder, w[j], l.remainder, j).bits);
  } else if (e.stochastic) {
    if (e.state[0].type == DType::bf16)
      encode_stochastic<bf16>(p, w, start, l);
    else
      encode_stochastic<f16>(p, w, start, l);
  } else {
    encode_any(e.state[0].type, w, p.inverse[0], 0, l.state[0]);
  }
}

}  // namespace quaver::cuda
