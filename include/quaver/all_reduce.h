// Stage "all-reduce": what a rank computes between the messages of an FP8 reduction (FP8-LM, arXiv
// 2310.18313, equations 4 to 6). The messages themselves are the caller's.
//
// A bucket is many tensors one behind the other, each from a multiple of kBucketAlignment on and
// with zeros behind it, cut into shards of whole multiples. An element's result depends on its
// tensor's scales and on the ranks' values alone, never on the bucket or the shard it is in.
#pragma once

#include "quaver/grad.h"
#include "quaver/scale.h"

namespace quaver {

constexpr int64_t kBucketAlignment = 16;  // elements: a vector never holds two tensors

constexpr int64_t bucket_length(int64_t numel) {
  return (numel + kBucketAlignment - 1) / kBucketAlignment * kBucketAlignment;
}

// Rounding to e4m3 or e5m2 raises a magnitude by less than this factor.
constexpr float kRoundedUp = 1.125f;

// How one tensor is encoded on every rank, and how the sum of all ranks is.
struct SharedScale {
  float scale, sum_scale;
};

// The scales from the amaxes of all ranks, in rank order, `stride` apart. `scale` fits the largest
// (equation 4: the smallest of the encode scales). `sum_scale` bounds the sum of all ranks' rounded
// values, so encoding it cannot overflow and needs no second message; the bound is tight where one
// rank holds the outliers. With `mu`, partial sums are to stay in the format (equation 3): both
// scales are those of mu * value, over mu.
QUAVER_HD SharedScale shared_scale(const float* amaxes, int64_t ranks, int64_t stride,
                                   float finite_max, const float* mu) {
  constexpr float largest_float = 3.40282347e38f;
  float largest = 0.0f;
  for (int64_t r = 0; r < ranks; ++r) {
    const float a = amaxes[r * stride];
    if (!is_finite(a)) return {1.0f, 1.0f};  // reported by the amax; the codes are unused
    largest = largest < a ? a : largest;
  }
  if (mu != nullptr) {
    const float wanted = largest / *mu;
    const float scale =
        scale_from_amax(is_finite(wanted) ? wanted : largest_float, finite_max, true);
    return {scale, scale};
  }
  const float scale = scale_from_amax(largest, finite_max, true);
  float bound = 0.0f;
  for (int64_t r = 0; r < ranks; ++r) {
    const float stored = amaxes[r * stride] * kRoundedUp;
    bound += stored < finite_max * scale ? stored : finite_max * scale;
  }
  return {scale, scale_from_amax(is_finite(bound) ? bound : largest_float, finite_max, true)};
}

// The arguments of reduce_shards: a shard of every rank, and the tensors in it.
struct ShardedSum {
  TensorView shards;  // [ranks, length] codes: this rank's shard of every rank's bucket
  int64_t first = 0;  // the shard's first element in the bucket
  const int64_t* sizes = nullptr;     // elements of each of the bucket's tensors, on the host
  int64_t count = 0;                  // tensors of the bucket
  const float* scales = nullptr;      // decode scale of each tensor's codes; null: 1
  const float* sum_scales = nullptr;  // of the result; null: 1
};

namespace cpu {

// Scales of `count` tensors from amaxes [ranks, count]; mu [count] or null.
void share_scales(float* scales, float* sum_scales, const float* amaxes, const float* mu,
                  int64_t ranks, int64_t count, DType dtype);

// bucket [1, length] = encode(values / scales[t]); zeros between and behind the tensors. Without
// scales they are 1.
void pack(const TensorView& bucket, const ScaledView* tensors, int64_t count, const float* scales);

// out [1, length] = encode((sum over ranks of scale * code, in f32 and in rank order) / sum_scale),
// in the codes' format or in f32. For each tensor of the bucket, of its part in this shard:
// amax[t] of the sums, and saturated[t], the number of results at FP8's finite maximum.
void reduce_shards(const TensorView& out, float* amax, int32_t* saturated, const ShardedSum& sum);

}  // namespace cpu

// The same on the device; `workspace` is device memory, 16-byte aligned.
namespace cuda {

void share_scales(float* scales, float* sum_scales, const float* amaxes, const float* mu,
                  int64_t ranks, int64_t count, DType dtype, void* stream);

int64_t pack_workspace_bytes(int64_t count);
void pack(const TensorView& bucket, const ScaledView* tensors, int64_t count, const float* scales,
          void* workspace, void* stream);

int64_t reduce_shards_workspace_bytes(int64_t count);
void reduce_shards(const TensorView& out, float* amax, int32_t* saturated, const ShardedSum& sum,
                   void* workspace, void* stream);

}  // namespace cuda
}  // namespace quaver
