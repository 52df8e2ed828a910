// What each op wants of its arguments, the same for every backend.
#pragma once

#include "quaver/codec.h"
#include "quaver/grad.h"
#include "quaver/optimizer.h"
#include "quaver/quantize.h"

namespace quaver {

inline void check_cast(const char* op, const TensorView& q, const TensorView& x) {
  QUAVER_CHECK(scale_max(q.dtype) > 0.0f, op, ": dtype must be e4m3, e5m2 or f16, got ",
               name_of(q.dtype));
  QUAVER_CHECK(!is_fp8(x.dtype), op, ": x must be f32, f16 or bf16, got ", name_of(x.dtype));
  QUAVER_CHECK(q.rows == x.rows && q.cols == x.cols, op, ": q must have x's shape [", x.rows, ", ",
               x.cols, "], got [", q.rows, ", ", q.cols, "]");
}

inline void check_quantize(const TensorView& q, const TensorView& scale, const TensorView& amax,
                           const TensorView& x, const QuantizeOptions& o,
                           const ScaleSource& source) {
  check_cast("quantize", q, x);
  QUAVER_CHECK(o.granularity != Granularity::block || o.block > 0,
               "quantize: block must be positive, got ", o.block);
  const int64_t groups = scale_count(x, o);
  QUAVER_CHECK(scale.numel() == groups && amax.numel() == groups, "quantize: wanted ", groups,
               " scales, got ", scale.numel());
  QUAVER_CHECK(!source.history || (o.granularity == Granularity::tensor && !source.given),
               "quantize: a history goes with tensor granularity and without a scale");
}

inline void check_dequantize(const TensorView& out, const TensorView& q, const TensorView& scale,
                             const QuantizeOptions& o) {
  QUAVER_CHECK(!is_fp8(out.dtype), "dequantize: dtype must be f32, f16 or bf16, got ",
               name_of(out.dtype));
  QUAVER_CHECK(out.numel() == q.numel(), "dequantize: out must have ", q.numel(), " values, got ",
               out.numel());
  const int64_t groups = scale_count(q, o);
  QUAVER_CHECK(scale.numel() == groups, "dequantize: wanted ", groups, " scales, got ",
               scale.numel());
}

inline void check_cast_transpose(const TensorView& q, const TensorView& qt, const TensorView& x,
                                 const ScaleSource& source) {
  check_cast("cast_transpose", q, x);
  QUAVER_CHECK(is_fp8(q.dtype) && qt.dtype == q.dtype,
               "cast_transpose: dtype must be e4m3 or e5m2, got ", name_of(q.dtype));
  QUAVER_CHECK(qt.rows == x.cols && qt.cols == x.rows, "cast_transpose: qt must be [", x.cols, ", ",
               x.rows, "], got [", qt.rows, ", ", qt.cols, "]");
  QUAVER_CHECK(!source.history || !source.given,
               "cast_transpose: a history and a given scale exclude each other");
}

inline void check_accumulate(const TensorView& target, const ScaledView& other) {
  QUAVER_CHECK(is_fp8(target.dtype) || target.dtype == DType::bf16,
               "accumulate: target must be e4m3, e5m2 or bf16, got ", name_of(target.dtype));
  QUAVER_CHECK(target.numel() == other.values.numel(), "accumulate: target has ", target.numel(),
               " values, other ", other.values.numel());
}

inline void check_groups(const char* op, const char* name, const StateView& s) {
  QUAVER_CHECK(is_fp8(s.values.dtype), op, ": ", name, " in groups must be e4m3 or e5m2, got ",
               name_of(s.values.dtype));
  QUAVER_CHECK(s.scale != nullptr || s.values.numel() == 0, op, ": ", name,
               " in groups needs their scales");
}

inline void check_encode_state(const StateView& s, const TensorView& x) {
  check_groups("encode_state", "q", s);
  QUAVER_CHECK(!is_fp8(x.dtype) && s.values.numel() == x.numel(), "encode_state: x must be ",
               s.values.numel(), " f32, f16 or bf16, got ", x.numel(), " ", name_of(x.dtype));
}

inline void check_decode_state(const TensorView& out, const StateView& s) {
  check_groups("decode_state", "q", s);
  QUAVER_CHECK(out.dtype == DType::f32 && out.numel() == s.values.numel(),
               "decode_state: out must be ", s.values.numel(), " f32, got ", out.numel(), " ",
               name_of(out.dtype));
}

inline void check_state(const char* name, const StateView& s, int64_t numel) {
  QUAVER_CHECK(s.values.numel() == numel, "adam_: ", name, " has ", s.values.numel(),
               " values, its parameter ", numel);
  if (s.scaling != Scaling::tensor) return check_groups("adam_", name, s);
  const bool needs = scale_max(s.values.dtype) > 0.0f;
  QUAVER_CHECK(!needs || (s.scale != nullptr && s.amax != nullptr), "adam_: ", name, " is ",
               name_of(s.values.dtype), " and needs a scale and an amax");
}

inline void check_moment(const char* name, const StateView& s, int64_t numel) {
  QUAVER_CHECK(s.values.dtype != DType::bf16, "adam_: ", name,
               " must be f32, f16, e4m3 or e5m2, got bf16");
  check_state(name, s, numel);
}

inline void check_weight(const AdamParameter& p) {
  const StateView& w = p.weight;
  QUAVER_CHECK(!is_fp8(w.values.dtype), "adam_: weight must be f32, bf16 or f16, got ",
               name_of(w.values.dtype));
  QUAVER_CHECK((w.scale == nullptr) == (w.amax == nullptr) &&
                   (w.scale == nullptr || w.values.dtype == DType::f16),
               "adam_: only an f16 weight has a scale, and then an amax too");
  const bool plain = w.values.dtype == DType::bf16;
  QUAVER_CHECK(plain || !(p.stochastic || p.remainder != nullptr),
               "adam_: stochastic rounding and a remainder go with a bf16 weight, got ",
               name_of(w.values.dtype));
  QUAVER_CHECK(!(p.stochastic && p.remainder != nullptr),
               "adam_: a weight with a remainder is exact and not rounded stochastically");
}

inline void check_adam(const AdamParameter& p) {
  const int64_t n = p.weight.values.numel();
  const DType w = p.weight.values.dtype;
  check_weight(p);
  check_moment("exp_avg", p.exp_avg, n);
  check_moment("exp_avg_sq", p.exp_avg_sq, n);
  QUAVER_CHECK(p.grad.numel() == n, "adam_: grad has ", p.grad.numel(), " values, its parameter ",
               n);
  QUAVER_CHECK(p.grad_amax != nullptr && p.step != nullptr && p.hyper != nullptr,
               "adam_: grad_amax, step and hyper are needed");
  if (p.fp8.data == nullptr) return;
  QUAVER_CHECK(w == DType::f16 && p.weight.scale != nullptr,
               "adam_: an FP8 copy goes with a scaled f16 weight, got ", name_of(w));
  QUAVER_CHECK(p.fp8.dtype == DType::e4m3 && p.fp8_t.dtype == DType::e4m3,
               "adam_: FP8 copies must be e4m3, got ", name_of(p.fp8.dtype), " and ",
               name_of(p.fp8_t.dtype));
  QUAVER_CHECK(p.fp8.numel() == n && p.fp8_t.rows == p.fp8.cols && p.fp8_t.cols == p.fp8.rows &&
                   p.fp8_scale != nullptr,
               "adam_: FP8 copies must be [N, K] and [K, N] like the weight, with a scale");
}

}  // namespace quaver
