// What each op wants of its arguments, the same for every backend.
#pragma once

#include "quaver/all_reduce.h"
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

inline void check_share_scales(DType dtype, int64_t ranks) {
  QUAVER_CHECK(is_fp8(dtype), "share_scales: dtype must be e4m3 or e5m2, got ", name_of(dtype));
  QUAVER_CHECK(ranks > 0, "share_scales: amaxes must be [ranks, tensors], got ", ranks, " ranks");
}

inline void check_pack(const TensorView& bucket, const ScaledView* tensors, int64_t count,
                       const float* scales) {
  int64_t length = 0;
  for (int64_t t = 0; t < count; ++t) length += bucket_length(tensors[t].values.numel());
  QUAVER_CHECK(length <= bucket.numel(), "pack: ", count, " tensors take ", length,
               " values, the bucket has ", bucket.numel());
  QUAVER_CHECK(bucket.numel() % kBucketAlignment == 0,
               "pack: the bucket's length must be a multiple of ", kBucketAlignment, ", got ",
               bucket.numel());
  QUAVER_CHECK(!is_fp8(bucket.dtype) || scales != nullptr || count == 0, "pack: a bucket of ",
               name_of(bucket.dtype), " needs scales");
}

inline void check_reduce_shards(const TensorView& out, const ShardedSum& s) {
  const char* op = "reduce_shards";
  QUAVER_CHECK(s.shards.rows > 0, op, ": shards must be [ranks, length], got ", s.shards.rows,
               " ranks");
  QUAVER_CHECK(s.shards.cols % kBucketAlignment == 0, op,
               ": a shard's length must be a multiple of ", kBucketAlignment, ", got ",
               s.shards.cols);
  QUAVER_CHECK(s.first >= 0 && s.first % kBucketAlignment == 0, op,
               ": first must be a multiple of ", kBucketAlignment, " and not negative, got ",
               s.first);
  QUAVER_CHECK(out.numel() == s.shards.cols, op, ": out must have ", s.shards.cols, " values, got ",
               out.numel());
  QUAVER_CHECK(out.dtype == s.shards.dtype || out.dtype == DType::f32, op,
               ": dtype must be f32 or that of the shards, ", name_of(s.shards.dtype), ", got ",
               name_of(out.dtype));
  for (int64_t t = 0; t < s.count; ++t)
    QUAVER_CHECK(s.sizes[t] >= 0, op, ": sizes must not be negative, got ", s.sizes[t]);
}

inline void check_state(const char* name, const StateView& s, int64_t numel) {
  QUAVER_CHECK(s.values.numel() == numel, "adam_: ", name, " has ", s.values.numel(),
               " values, its parameter ", numel);
  QUAVER_CHECK(!is_scaled(s) || (s.scale != nullptr && s.amax != nullptr), "adam_: ", name, " is ",
               name_of(s.values.dtype), " and needs a scale and an amax");
}

inline void check_adam(const AdamParameter& p) {
  const int64_t n = p.weight.values.numel();
  const DType w = p.weight.values.dtype;
  const DType m = p.exp_avg.values.dtype, v = p.exp_avg_sq.values.dtype;
  bool known = false;
#define QUAVER_CASE(W, M, V) \
  known = known || (w == DTypeOf<W>::value && m == DTypeOf<M>::value && v == DTypeOf<V>::value);
  QUAVER_ADAM_CODECS(QUAVER_CASE)
#undef QUAVER_CASE
  QUAVER_CHECK(known, "adam_: no codec for weight, exp_avg and exp_avg_sq in ", name_of(w), ", ",
               name_of(m), " and ", name_of(v));
  check_state("weight", p.weight, n);
  check_state("exp_avg", p.exp_avg, n);
  check_state("exp_avg_sq", p.exp_avg_sq, n);
  QUAVER_CHECK(p.grad.numel() == n, "adam_: grad has ", p.grad.numel(), " values, its parameter ",
               n);
  QUAVER_CHECK(p.grad_amax != nullptr && p.step != nullptr && p.hyper != nullptr,
               "adam_: grad_amax, step and hyper are needed");
  if (p.fp8.data == nullptr) return;
  QUAVER_CHECK(w == DType::f16, "adam_: an FP8 copy goes with an f16 weight, got ", name_of(w));
  QUAVER_CHECK(p.fp8.dtype == DType::e4m3 && p.fp8_t.dtype == DType::e4m3,
               "adam_: FP8 copies must be e4m3, got ", name_of(p.fp8.dtype), " and ",
               name_of(p.fp8_t.dtype));
  QUAVER_CHECK(p.fp8.numel() == n && p.fp8_t.rows == p.fp8.cols && p.fp8_t.cols == p.fp8.rows &&
                   p.fp8_scale != nullptr,
               "adam_: FP8 copies must be [N, K] and [K, N] like the weight, with a scale");
}

}  // namespace quaver
