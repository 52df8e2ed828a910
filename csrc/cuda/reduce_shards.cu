// Decodes the shards of all ranks, sums them in f32 in rank order and encodes the sum: one read of
// every shard, one write (FP8-LM's gradient reduction without its roundings between ranks).
#include <vector>

#include "../arguments.h"
#include "dispatch.h"
#include "tensor_list.h"

namespace quaver::cuda {
namespace {

constexpr int64_t kChunk = 4 * kBlockSpan;
constexpr int kAhead = 4;  // ranks whose loads are in flight together

struct Entry {
  int64_t offset, length;  // of the tensor's part in the shard
  int64_t first;           // chunk
};

struct Problem {
  const Entry* table;
  int64_t count, ranks, length;
  const void* shards;
  void* out;
  const float* scales;      // null: 1
  const float* sum_scales;  // null: 1
  float* amax;
  int32_t* saturated;
  bool aligned;
};

// sum += scale * decode(codes)
template <class Q>
QUAVER_DEVICE void add(const Packed<sizeof(Q)>& codes, float scale, float (&sum)[kVector]) {
  float x[kVector];
  decode_vector<Q>(codes, x);
#pragma unroll
  for (int k = 0; k < kVector; ++k) sum[k] += x[k] * scale;
}

template <class Out>
QUAVER_DEVICE int32_t count_saturated(const Packed<sizeof(Out)>& codes) {
  int32_t count = 0;
  if constexpr (sizeof(Out) == 1) {
#pragma unroll
    for (int k = 0; k < kVector; ++k)
      count += (codes.word[k / 4] >> k % 4 * 8 & 0x7fu) == Format<Out>::max_code;
  }
  return count;
}

template <class Q, class Out>
__global__ void __launch_bounds__(kThreads, 2) reduce_shards_kernel(Problem p) {
  const int64_t owner = owner_of(p.table, p.count, blockIdx.x);
  const Entry e = p.table[owner];
  const float scale = p.scales != nullptr ? p.scales[owner] : 1.0f;
  const Divisor sum_scale = divisor(p.sum_scales != nullptr ? p.sum_scales[owner] : 1.0f);
  const int64_t begin = (int64_t(blockIdx.x) - e.first) * kChunk;
  const int64_t end = e.length < begin + kChunk ? e.length : begin + kChunk;
  const Q* shards = static_cast<const Q*>(p.shards) + e.offset;
  Out* out = static_cast<Out*>(p.out) + e.offset;
  uint32_t seen = 0;
  int32_t at_max = 0;
  for (int64_t i = begin + int64_t(threadIdx.x) * kVector; i < end; i += kBlockSpan) {
    float sum[kVector];
    decode_vector<Q>(load<sizeof(Q)>(shards + i, sizeof(Q), kVector, p.aligned), sum);
#pragma unroll
    for (int k = 0; k < kVector; ++k) sum[k] *= scale;
    int64_t r = 1;
    for (; r + kAhead <= p.ranks; r += kAhead) {
      Packed<sizeof(Q)> codes[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        codes[k] = load<sizeof(Q)>(shards + (r + k) * p.length + i, sizeof(Q), kVector, p.aligned);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) add<Q>(codes[k], scale, sum);
    }
    for (; r < p.ranks; ++r)
      add<Q>(load<sizeof(Q)>(shards + r * p.length + i, sizeof(Q), kVector, p.aligned), scale, sum);
    seen = max_bits(seen, amax_bits(sum));
    divide(sum, sum_scale);
    Packed<sizeof(Out)> codes;
    encode_vector<Out>(sum, codes);
    at_max += count_saturated<Out>(codes);
    store(out + i, codes, sizeof(Out), kVector, p.aligned);
  }
  block_atomic_max(p.amax + owner, seen);
  if (at_max != 0) atomicAdd(p.saturated + owner, at_max);
}

}  // namespace

int64_t reduce_shards_workspace_bytes(int64_t count) {
  return ceil_div(count * int64_t(sizeof(Entry)), 16) * 16;
}

void reduce_shards(const TensorView& out, float* amax, int32_t* saturated, const ShardedSum& s,
                   void* workspace, void* stream) {
  const char* op = "reduce_shards";
  check_reduce_shards(out, s);
  const int64_t length = s.shards.cols;
  std::vector<Entry> entries(static_cast<size_t>(s.count));
  int64_t chunks = 0, offset = -s.first;
  for (int64_t t = 0; t < s.count; ++t) {
    const int64_t tensor_end = offset + bucket_length(s.sizes[t]);
    const int64_t first = std::max<int64_t>(offset, 0);
    const int64_t part = std::max<int64_t>(0, std::min(tensor_end, length) - first);
    entries[t] = {first, part, chunks};
    chunks += ceil_div(part, kChunk);
    offset = tensor_end;
  }
  const int64_t used = std::min(std::max<int64_t>(offset, 0), length);
  const int64_t size = size_of(out.dtype);
  clear(op, out.as<char>() + used * size, (length - used) * size, stream);
  clear(op, amax, s.count * int64_t(sizeof(float)), stream);
  clear(op, saturated, s.count * int64_t(sizeof(int32_t)), stream);
  if (chunks == 0) return;
  upload(op, workspace, entries.data(), s.count * int64_t(sizeof(Entry)), stream);
  const Problem p{static_cast<const Entry*>(workspace),
                  s.count,
                  s.shards.rows,
                  length,
                  s.shards.data,
                  out.data,
                  s.scales,
                  s.sum_scales,
                  amax,
                  saturated,
                  is_aligned(s.shards.data) && is_aligned(out.data)};
  with_any(s.shards.dtype, [&](auto code) {
    using Q = decltype(code);
    if (out.dtype == DType::f32)
      launch(op, reduce_shards_kernel<Q, float>, chunks, kThreads, stream, p);
    else
      launch(op, reduce_shards_kernel<Q, Q>, chunks, kThreads, stream, p);
  });
}

}  // namespace quaver::cuda
