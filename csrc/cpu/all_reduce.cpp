#include "quaver/all_reduce.h"

#include <algorithm>
#include <cstring>

#include "../arguments.h"
#include "parallel.h"
#include "simd.h"

namespace quaver::cpu {
namespace {

const char* at(const TensorView& x, int64_t i) { return x.as<const char>() + i * size_of(x.dtype); }
char* out_at(const TensorView& x, int64_t i) { return x.as<char>() + i * size_of(x.dtype); }

// to[i] = encode(decode(x[i]) / scale): a multiplication where the reciprocal is exact.
void encode(char* to, DType to_type, const void* x, DType type, int64_t n, float scale) {
  const bool exact = is_power_of_two(scale);
  simd().cast(to, to_type, x, type, n, exact ? 1.0f / scale : scale, !exact);
}

void clear(const TensorView& x, int64_t begin, int64_t end) {
  if (begin < end) std::memset(out_at(x, begin), 0, (end - begin) * size_of(x.dtype));
}

}  // namespace

void share_scales(float* scales, float* sum_scales, const float* amaxes, const float* mu,
                  int64_t ranks, int64_t count, DType dtype) {
  check_share_scales(dtype, ranks);
  for (int64_t t = 0; t < count; ++t) {
    const SharedScale s =
        shared_scale(amaxes + t, ranks, count, scale_max(dtype), mu != nullptr ? mu + t : nullptr);
    scales[t] = s.scale;
    sum_scales[t] = s.sum_scale;
  }
}

void pack(const TensorView& bucket, const ScaledView* tensors, int64_t count, const float* scales) {
  check_pack(bucket, tensors, count, scales);
  int64_t offset = 0;
  for (int64_t t = 0; t < count; ++t) {
    const TensorView& x = tensors[t].values;
    const float own = tensors[t].scale != nullptr ? *tensors[t].scale : 1.0f;
    const float scale = scales != nullptr ? scales[t] : 1.0f;
    auto body = [&](int64_t begin, int64_t end) {
      if (own == 1.0f)
        return encode(out_at(bucket, offset + begin), bucket.dtype, at(x, begin), x.dtype,
                      end - begin, scale);
      alignas(64) float values[kBlock];
      for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t n = std::min(kBlock, end - i);
        simd().cast(values, DType::f32, at(x, i), x.dtype, n, own, false);
        encode(out_at(bucket, offset + i), bucket.dtype, values, DType::f32, n, scale);
      }
    };
    parallel_for(x.numel(), kGrain, body);
    const int64_t next = offset + bucket_length(x.numel());
    clear(bucket, offset + x.numel(), next);
    offset = next;
  }
  clear(bucket, offset, bucket.numel());
}

void reduce_shards(const TensorView& out, float* amax, int32_t* saturated, const ShardedSum& s) {
  check_reduce_shards(out, s);
  const int64_t ranks = s.shards.rows, length = s.shards.cols;
  int64_t offset = -s.first;  // the tensor's first element in the shard
  for (int64_t t = 0; t < s.count; ++t) {
    // Padding is summed like values: it is zero, and whole vectors are simple on every device.
    const int64_t tensor_end = offset + bucket_length(s.sizes[t]);
    const int64_t first = std::max<int64_t>(offset, 0), last = std::min(tensor_end, length);
    offset = tensor_end;
    const float scale = s.scales != nullptr ? s.scales[t] : 1.0f;
    const float sum_scale = s.sum_scales != nullptr ? s.sum_scales[t] : 1.0f;
    AtomicAmax seen;
    std::atomic<int32_t> at_max{0};
    auto body = [&](int64_t begin, int64_t end) {
      const ShardSpan shards = {at(s.shards, first + begin), s.shards.dtype, scale, ranks, length};
      int32_t count = 0;
      seen.add(simd().sum_shards(out_at(out, first + begin), out.dtype, sum_scale, shards,
                                 end - begin, &count));
      at_max += count;
    };
    parallel_for(last - first, kGrain, body);
    amax[t] = bit_cast<float>(seen.bits());
    saturated[t] = at_max;
  }
  const int64_t used = std::min(std::max<int64_t>(offset, 0), length);
  clear(out, used, length);
}

}  // namespace quaver::cpu
