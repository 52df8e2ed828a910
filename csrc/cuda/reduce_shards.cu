// Decodes the shards of all ranks, sums them in f32 in rank order and encodes the sum: one read of
// every shard, one write (FP8-LM's gradient reduction without its roundings between ranks).
#include <vector>

#include "../arguments.h"
#include "dispatch.h"
#include "list_runs.h"
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
};

// The elements of a run, which are an access of the wider type, and those from one run of a thread
// to the next.
template <class Q, class Out>
constexpr int kRun = run_length(std::max(sizeof(Q), sizeof(Out)));
template <class Q, class Out>
constexpr int64_t kApart = kThreads * kRun<Q, Out>;

template <class Q, class Out, bool kAligned>
QUAVER_DEVICE Packed<sizeof(Q)> load_shard(const Q* from, int64_t n) {
  return load_runs<kRun<Q, Out>>(from, kApart<Q, Out>, n, kAligned);
}

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

template <class Q, class Out, bool kAligned>
__global__ void __launch_bounds__(kThreads, kAligned ? 2 : 1) reduce_shards_kernel(Problem p) {
  const auto load = load_shard<Q, Out, kAligned>;
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
  for (int64_t i = begin + int64_t(threadIdx.x) * kRun<Q, Out>; i < end; i += kBlockSpan) {
    const int64_t n = end - i;
    float sum[kVector];
    decode_vector<Q>(load(shards + i, n), sum);
#pragma unroll
    for (int k = 0; k < kVector; ++k) sum[k] *= scale;
    int64_t r = 1;
    for (; r + kAhead <= p.ranks; r += kAhead) {
      Packed<sizeof(Q)> codes[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) codes[k] = load(shards + (r + k) * p.length + i, n);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) add<Q>(codes[k], scale, sum);
    }
    for (; r < p.ranks; ++r) add<Q>(load(shards + r * p.length + i, n), scale, sum);
    mask_runs<kRun<Q, Out>>(sum, kApart<Q, Out>, n);  // the scale may not be finite
    seen = max_bits(seen, amax_bits(sum));
    divide(sum, sum_scale);
    Packed<sizeof(Out)> codes;
    encode_vector<Out>(sum, codes);
    at_max += count_saturated<Out>(codes);
    if (kAligned)
      store_whole_runs<kRun<Q, Out>>(out + i, codes, kApart<Q, Out>, n);
    else
      store_runs<kRun<Q, Out>>(out + i, codes, kApart<Q, Out>, n, false);
  }
  block_atomic_max(p.amax + owner, seen);
  if (at_max != 0) atomicAdd(p.saturated + owner, at_max);
}

// Calls body(Out{}) with the type of the sums, f32 or that of the shards.
template <class Q, class Body>
void with_sum(DType type, Body body) {
  if (type == DType::f32) return body(float{});
  body(Q{});
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
                  saturated};
  const bool aligned = is_aligned(s.shards.data) && is_aligned(out.data);
  with_any(s.shards.dtype, [&](auto code) {
    using Q = decltype(code);
    with_sum<Q>(out.dtype, [&](auto sum) {
      using Out = decltype(sum);
      launch(op, aligned ? reduce_shards_kernel<Q, Out, true> : reduce_shards_kernel<Q, Out, false>,
             chunks, kThreads, stream, p);
    });
  });
}

}  // namespace quaver::cuda
