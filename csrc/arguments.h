// Checks of each op's arguments, the same for every backend.
#pragma once

#include <utility>

#include "check_subset.h"
#include "quaver/all_reduce.h"
#include "quaver/cast.h"
#include "quaver/codec.h"
#include "quaver/gemm.h"
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

// The bound keeps every product of sizes in range.
inline void check_block(const char* op, const Layout& layout) {
  if (layout.grain != Grain::block) return;
  constexpr int64_t most = int64_t(1) << 30;
  QUAVER_CHECK(layout.block > 0, op, ": block must be positive, got ", layout.block);
  QUAVER_CHECK(layout.block <= most, op, ": block must be at most ", most, ", got ", layout.block);
}

inline void check_quantize(const TensorView& q, const TensorView& scale, const TensorView& amax,
                           const TensorView& x, const QuantizeOptions& o,
                           const ScaleSource& source) {
  check_cast("quantize", q, x);
  check_block("quantize", o.layout);
  const int64_t scales = o.layout.scale_count(x);
  QUAVER_CHECK(scale.numel() == scales && amax.numel() == scales, "quantize: wanted ", scales,
               " scales, got ", scale.numel());
  QUAVER_CHECK(!source.history || (o.layout.grain == Grain::tensor && !source.given),
               "quantize: a history goes with tensor granularity and without a scale");
}

inline void check_dequantize(const TensorView& out, const TensorView& q, const TensorView& scale,
                             const Layout& layout) {
  QUAVER_CHECK(!is_fp8(out.dtype), "dequantize: dtype must be f32, f16 or bf16, got ",
               name_of(out.dtype));
  QUAVER_CHECK(out.numel() == q.numel(), "dequantize: out must have ", q.numel(), " values, got ",
               out.numel());
  check_block("dequantize", layout);
  const int64_t scales = layout.scale_count(q);
  QUAVER_CHECK(scale.numel() == scales, "dequantize: wanted ", scales, " scales, got ",
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

// A cast of an op's result [rows, cols] to both layouts, padded.
inline void check_gemm_cast(const char* op, const GemmCast& to, int64_t rows, int64_t cols) {
  QUAVER_CHECK(is_fp8(to.q.dtype) && to.qt.dtype == to.q.dtype, op,
               ": dtype must be e4m3 or e5m2, got ", name_of(to.q.dtype));
  const int64_t r = gemm_padded(rows), c = gemm_padded(cols);
  QUAVER_CHECK(to.q.rows == r && to.q.cols == c && to.qt.rows == c && to.qt.cols == r, op,
               ": q and qt of [", rows, ", ", cols, "] must be [", r, ", ", c, "] and [", c, ", ",
               r, "], got [", to.q.rows, ", ", to.q.cols, "] and [", to.qt.rows, ", ", to.qt.cols,
               "]");
  QUAVER_CHECK(!to.source.history || !to.source.given, op,
               ": a history and a given scale exclude each other");
}

inline void check_float(const char* op, const char* name, const TensorView& x) {
  QUAVER_CHECK(!is_fp8(x.dtype), op, ": ", name, " must be f32, f16 or bf16, got ",
               name_of(x.dtype));
}

inline void check_like(const char* op, const char* name, const TensorView& got, int64_t rows,
                       int64_t cols) {
  QUAVER_CHECK(got.rows == rows && got.cols == cols, op, ": ", name, " must be [", rows, ", ", cols,
               "], got [", got.rows, ", ", got.cols, "]");
}

inline void check_grouped(const char* op, const char* name, const GroupedView& x, int64_t rows,
                          int64_t cols) {
  check_block(op, x.layout);
  QUAVER_CHECK(x.codes.dtype == DType::e4m3, op, ": ", name, " must be e4m3, got ",
               name_of(x.codes.dtype));
  check_like(op, name, x.codes, rows, cols);
}

inline void check_channels(const char* op, const char* name, const TensorView& v, int64_t cols) {
  if (v.data == nullptr) return;
  check_float(op, name, v);
  QUAVER_CHECK(v.numel() == cols, op, ": ", name, " must have ", cols, " values, got ", v.numel());
}

inline void check_normalize_inputs(const char* op, const GroupedView& saved, const TensorView& x,
                                   const TensorView& weight, const TensorView& bias) {
  check_float(op, "x", x);
  check_grouped(op, "xq", saved, x.rows, x.cols);
  check_channels(op, "weight", weight, x.cols);
  check_channels(op, "bias", bias, x.cols);
}

inline void check_normalize(const GemmCast& y, const GroupedView& saved, const TensorView& x,
                            const TensorView& weight, const TensorView& bias) {
  check_normalize_inputs("normalize", saved, x, weight, bias);
  check_gemm_cast("normalize", y, x.rows, x.cols);
}

inline void check_normalize_backward(const TensorView& dx, const TensorView& dy,
                                     const GroupedView& x, const TensorView& weight) {
  check_float("normalize_backward", "dy", dy);
  check_float("normalize_backward", "dx", dx);
  check_like("normalize_backward", "dx", dx, dy.rows, dy.cols);
  check_grouped("normalize_backward", "xq", x, dy.rows, dy.cols);
  check_channels("normalize_backward", "weight", weight, dy.cols);
}

inline void check_activate_inputs(const char* op, const GroupedView& x_saved,
                                  const GroupedView& up_saved, const TensorView& x,
                                  const TensorView& up) {
  check_float(op, "x", x);
  check_grouped(op, "xq", x_saved, x.rows, x.cols);
  if (up.data == nullptr) return;
  check_like(op, "up", up, x.rows, x.cols);
  QUAVER_CHECK(up.dtype == x.dtype, op, ": up must be ", name_of(x.dtype), " like x, got ",
               name_of(up.dtype));
  check_grouped(op, "uq", up_saved, x.rows, x.cols);
}

inline void check_activate(const GemmCast& y, const GroupedView& x_saved,
                           const GroupedView& up_saved, const TensorView& x, const TensorView& up) {
  check_activate_inputs("activate", x_saved, up_saved, x, up);
  check_gemm_cast("activate", y, x.rows, x.cols);
}

inline void check_gradient_inputs(const char* op, const TensorView& dy, const GroupedView& x,
                                  const GroupedView& up) {
  check_float(op, "dy", dy);
  check_grouped(op, "xq", x, dy.rows, dy.cols);
  if (up.codes.data != nullptr) check_grouped(op, "uq", up, dy.rows, dy.cols);
}

// Whether dx holds both gradients, side by side.
inline bool is_joint(const GemmCast& dup, const GroupedView& up) {
  return up.codes.data != nullptr && dup.scale == nullptr;
}

inline void check_activate_backward(const GemmCast& dx, const GemmCast& dup, const TensorView& dy,
                                    const GroupedView& x, const GroupedView& up) {
  const char* op = "activate_backward";
  check_gradient_inputs(op, dy, x, up);
  const bool joint = is_joint(dup, up);
  QUAVER_CHECK(!joint || dy.cols % kGemmAlign == 0, op,
               ": joint gradients must have a multiple of ", kGemmAlign, " columns each, got ",
               dy.cols);
  check_gemm_cast(op, dx, dy.rows, joint ? 2 * dy.cols : dy.cols);
  if (up.codes.data != nullptr && !joint) check_gemm_cast(op, dup, dy.rows, dy.cols);
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
  constexpr int64_t most = int64_t(1) << 56;  // of first and of all sizes: sums stay in range
  QUAVER_CHECK(s.first <= most, op, ": first must be at most ", most, ", got ", s.first);
  for (int64_t t = 0, total = 0; t < s.count; ++t) {
    QUAVER_CHECK(s.sizes[t] >= 0, op, ": sizes must not be negative, got ", s.sizes[t]);
    QUAVER_CHECK(s.sizes[t] <= most - total, op, ": sizes must be at most ", most,
                 " together, got ", s.sizes[t]);
    total += bucket_length(s.sizes[t]);
  }
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

inline void check_aligned(const char* name, const void* data, DType type) {
  QUAVER_CHECK(reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(size_of(type)) == 0,
               "adam_: ", name, " is ", name_of(type), " and must start at a multiple of ",
               size_of(type), " bytes, got ", data);
}

inline void check_state(const char* name, const StateView& s, int64_t numel) {
  check_aligned(name, s.values.data, s.values.dtype);
  QUAVER_CHECK(s.values.numel() == numel, "adam_: ", name, " has ", s.values.numel(),
               " values, its parameter ", numel);
  if (s.scaling != Scaling::tensor) return check_groups("adam_", name, s);
  const bool wanted = scale_max(s.values.dtype) > 0.0f;
  QUAVER_CHECK((s.scale != nullptr) == wanted && (s.amax != nullptr) == wanted, "adam_: ", name,
               " is ", name_of(s.values.dtype), wanted ? " and needs" : " and takes neither",
               " a scale ", wanted ? "and" : "nor", " an amax");
}

inline void check_moment(const char* name, const StateView& s, int64_t numel,
                         bool may_be_bf16 = false) {
  QUAVER_CHECK(s.values.dtype != DType::bf16 || may_be_bf16, "adam_: ", name,
               " must be f32, f16, e4m3 or e5m2, got bf16");
  check_state(name, s, numel);
}

// Subset-Norm's second moment (arXiv 2411.07120, section 3).
inline void check_subsets(const AdamParameter& p) {
  const int64_t n = p.weight.values.numel();
  const StateView& s = p.exp_avg_sq;
  check_subset_width("adam_", p.subsets, n);
  const DType type = s.values.dtype;
  QUAVER_CHECK((type == DType::f32 || type == DType::bf16) && s.scaling == Scaling::tensor &&
                   s.scale == nullptr,
               "adam_: an exp_avg_sq of subsets must be f32 or bf16 without a scale, got ",
               name_of(type));
  check_aligned("exp_avg_sq", s.values.data, s.values.dtype);
  const int64_t wanted = subset_count(p.subsets, n);
  QUAVER_CHECK(s.values.numel() == wanted, "adam_: exp_avg_sq has ", s.values.numel(),
               " values, its weight ", wanted, " subsets");
  QUAVER_CHECK(p.subset_sums != nullptr || wanted == 0,
               "adam_: subsets need the sums of their squared gradients, of subset_sums");
}

inline void check_weight(const AdamParameter& p) {
  const StateView& w = p.weight;
  check_aligned("weight", w.values.data, w.values.dtype);
  QUAVER_CHECK(!is_fp8(w.values.dtype), "adam_: weight must be f32, bf16 or f16, got ",
               name_of(w.values.dtype));
  QUAVER_CHECK((w.scale == nullptr) == (w.amax == nullptr) &&
                   (w.scale == nullptr || w.values.dtype == DType::f16),
               "adam_: only an f16 weight has a scale, and then an amax too");
  const DType type = w.values.dtype;
  QUAVER_CHECK(type == DType::bf16 || p.remainder.bytes == 0,
               "adam_: a remainder goes with a bf16 weight, got ", name_of(type));
  QUAVER_CHECK(size_of(type) == 2 || !p.stochastic,
               "adam_: stochastic rounding goes with a bf16 or f16 weight, got ", name_of(type));
  QUAVER_CHECK(p.first_element >= 0, "adam_: first_element must not be negative, got ",
               p.first_element);
  QUAVER_CHECK(!(p.stochastic && p.remainder.bytes != 0),
               "adam_: a weight with a remainder is exact and not rounded stochastically");
}

inline void check_adam(const AdamParameter& p) {
  const int64_t n = p.weight.values.numel();
  const DType w = p.weight.values.dtype;
  check_weight(p);
  check_aligned("grad", p.grad.data, p.grad.dtype);
  check_moment("exp_avg", p.exp_avg, n, p.subsets.width != 0);
  if (p.subsets.width != 0)
    check_subsets(p);
  else
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

inline void check_gemm(const GemmArguments& g) {
  QUAVER_CHECK(is_fp8(g.a.dtype) && is_fp8(g.b.dtype), "gemm: a and b must be e4m3 or e5m2, got ",
               name_of(g.a.dtype), " and ", name_of(g.b.dtype));
  QUAVER_CHECK(g.a.cols == g.b.cols, "gemm: a [M, K] and b [N, K] must share K, got [", g.a.rows,
               ", ", g.a.cols, "] and [", g.b.rows, ", ", g.b.cols, "]");
  QUAVER_CHECK(g.out.rows == g.a.rows && g.out.cols == g.b.rows, "gemm: out must be [", g.a.rows,
               ", ", g.b.rows, "], got [", g.out.rows, ", ", g.out.cols, "]");
  QUAVER_CHECK(g.scale_a != nullptr && g.scale_b != nullptr, "gemm: scales are needed");
  QUAVER_CHECK(!(g.accumulate && g.bias != nullptr),
               "gemm: bias and accumulate exclude each other");
  QUAVER_CHECK(!is_fp8(g.out.dtype) || (g.out_scale != nullptr && g.amax != nullptr),
               "gemm: FP8 out needs a scale and an amax");
  QUAVER_CHECK(is_fp8(g.out.dtype) || (g.out_scale == nullptr && g.amax == nullptr),
               "gemm: a scale and an amax go with FP8 out, got ", name_of(g.out.dtype));
  QUAVER_CHECK(!is_fp8(g.out.dtype) || !g.accumulate, "gemm: FP8 cannot be accumulated into");
}

// Limits of the tensor cores and the kernels, checked on every GPU so that all refuse the same
// calls.
inline void check_gemm_cuda(const GemmArguments& g) {
  check_gemm(g);
  QUAVER_CHECK(g.a.dtype == DType::e4m3 || g.b.dtype == DType::e4m3,
               "gemm: e5m2 x e5m2 has no CUDA kernel; at least one operand must be e4m3");
  for (const auto& [name, size] :
       {std::pair{"M", g.a.rows}, std::pair{"N", g.b.rows}, std::pair{"K", g.a.cols}})
    QUAVER_CHECK(size <= kGemmMaxSize, "gemm: ", name, " must be at most ", kGemmMaxSize,
                 " on CUDA, got ", size);
  QUAVER_CHECK(
      reinterpret_cast<uintptr_t>(g.out.data) % static_cast<uintptr_t>(size_of(g.out.dtype)) == 0,
      "gemm: out is ", name_of(g.out.dtype), " and must start at a multiple of ",
      size_of(g.out.dtype), " bytes, got ", g.out.data);
}

}  // namespace quaver
