// The kernel that packs many tensors into one bucket, each by one cast (FP8-LM, equation 5). A
// block casts a chunk of one tensor, each thread runs of four elements.
#include <vector>

#include "../arguments.h"
#include "dispatch.h"
#include "list_runs.h"
#include "tensor_list.h"

namespace quaver::cuda {
namespace {

constexpr int64_t kChunk = 4 * kBlockSpan;
constexpr int64_t kApart = kThreads * kQuad;

struct Entry {
  const void* data;
  const float* own_scale;  // null: 1
  int64_t numel, offset;   // elements; the offset in the bucket
  int64_t first;           // chunk
  DType type;
  bool aligned;
};

template <class Q, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1)
    pack_kernel(const Entry* table, int64_t count, const float* scales, Q* bucket) {
  const int64_t owner = owner_of(table, count, blockIdx.x);
  const Entry e = table[owner];
  const float own = e.own_scale != nullptr ? *e.own_scale : 1.0f;
  const Divisor scale = divisor(scales != nullptr ? scales[owner] : 1.0f);
  const int64_t begin = (int64_t(blockIdx.x) - e.first) * kChunk;
  const int64_t length = bucket_length(e.numel);
  const int64_t end = length < begin + kChunk ? length : begin + kChunk;
  for (int64_t i = begin + int64_t(threadIdx.x) * kQuad; i < end; i += kBlockSpan) {
    // Loads beyond the tensor give zeros, which pad the bucket.
    const AnyPacked v = load_any_fours(e.data, e.type, i, kApart, e.numel - i, e.aligned);
    float x[kVector];
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      float part[kQuad];
      decode_any(e.type, v, quad, own, part);
#pragma unroll
      for (int k = 0; k < kQuad; ++k) x[quad * kQuad + k] = part[k];
    }
    divide(x, scale);
    Packed<sizeof(Q)> codes;
    encode_vector<Q>(x, codes);
    Q* to = bucket + e.offset + i;
    if (kAligned)
      store_whole_runs<kQuad>(to, codes, kApart, end - i);
    else
      store_runs<kQuad>(to, codes, kApart, end - i, false);
  }
}

}  // namespace

int64_t pack_workspace_bytes(int64_t count) {
  return ceil_div(count * int64_t(sizeof(Entry)), 16) * 16;
}

void pack(const TensorView& bucket, const ScaledView* tensors, int64_t count, const float* scales,
          void* workspace, void* stream) {
  const char* op = "pack";
  check_pack(bucket, tensors, count, scales);
  std::vector<Entry> entries(static_cast<size_t>(count));
  int64_t chunks = 0, offset = 0;
  for (int64_t t = 0; t < count; ++t) {
    const TensorView& x = tensors[t].values;
    const int64_t length = bucket_length(x.numel());
    entries[t] = {x.data, tensors[t].scale, x.numel(), offset, chunks, x.dtype, is_aligned(x.data)};
    chunks += ceil_div(length, kChunk);
    offset += length;
  }
  const int64_t size = size_of(bucket.dtype);
  clear(op, bucket.as<char>() + offset * size, (bucket.numel() - offset) * size, stream);
  if (chunks == 0) return;
  upload(op, workspace, entries.data(), count * int64_t(sizeof(Entry)), stream);
  with_any(bucket.dtype, [&](auto to) {
    using Q = decltype(to);
    launch(op, is_aligned(bucket.data) ? pack_kernel<Q, true> : pack_kernel<Q, false>, chunks,
           kThreads, stream, static_cast<const Entry*>(workspace), count, scales, bucket.as<Q>());
  });
}

}  // namespace quaver::cuda
