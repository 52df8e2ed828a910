// Sums of squares over subsets and the amaxes of all gradients in one read, in the CPU's order (see
// quaver/subset.h). A warp sums a piece of consecutive elements, a lane of the sum each thread; a
// thread sums one of strided elements. Where subsets have several pieces, a second launch adds
// them.
#include <algorithm>
#include <vector>

#include "../check_subset.h"
#include "quaver/subset.h"
#include "tensor_list.h"

namespace quaver::cuda {
namespace {

static_assert(kSubsetLanes == kWarp, "a lane of the sum is a thread of the warp");
constexpr int kWarps = kThreads / kWarp;
constexpr int kAhead = 8;  // elements of a thread whose loads are in flight together

struct Entry {
  const void* grad;
  const float* scale;  // null: 1
  const float* amax;   // null: its own
  float* sums;         // null: none
  float* partial;      // sums of pieces, where subsets have several
  int64_t numel, width, count, pieces;
  int64_t first;  // block of this gradient
  int64_t owner;
  DType type;
  bool strided;
};

struct Problem {
  const Entry* table;
  int64_t count;
  float* amax;
};

template <class T>
QUAVER_DEVICE float value_of(T x) {
  float values[4 / sizeof(T)];
  uint32_t word = 0;
  if constexpr (sizeof(T) == 4)
    word = bit_cast<uint32_t>(x);
  else
    word = x.bits;
  decode_word(T{}, word, values);
  return values[0];
}

// Elements begin, begin + stride, ... below `end` of a gradient.
struct Walk {
  int64_t begin, end, stride;
};

// The sum of their squares, in order.
template <class T>
QUAVER_DEVICE float sum_of_squares(T, const void* grad, float scale, const Walk& w,
                                   uint32_t& seen) {
  const T* from = static_cast<const T*>(grad);
  float sum = 0.0f;
#pragma unroll 1
  for (int64_t i = w.begin; i < w.end; i += kAhead * w.stride) {
    float x[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      x[k] = i + k * w.stride < w.end ? value_of(from[i + k * w.stride]) * scale : 0.0f;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      seen = max_bits(seen, magnitude_bits(x[k]));
      sum += x[k] * x[k];  // of nothing 0, which changes no sum
    }
  }
  return sum;
}

QUAVER_DEVICE float sum_of_squares(const Entry& e, float scale, const Walk& w, uint32_t& seen) {
  switch (e.type) {
    case DType::f32: return sum_of_squares(float{}, e.grad, scale, w, seen);
    case DType::f16: return sum_of_squares(f16{}, e.grad, scale, w, seen);
    case DType::bf16: return sum_of_squares(bf16{}, e.grad, scale, w, seen);
    case DType::e4m3: return sum_of_squares(e4m3{}, e.grad, scale, w, seen);
    default: return sum_of_squares(e5m2{}, e.grad, scale, w, seen);
  }
}

// Partial sums of a piece lie side by side, so that neighbouring threads join neighbours.
QUAVER_DEVICE void store_sum(const Entry& e, int64_t subset, int64_t piece, float sum) {
  if (e.sums == nullptr) return;
  (e.pieces > 1 ? e.partial + piece * e.count : e.sums)[subset] = sum;
}

// A warp sums a piece. All its threads call it, without work where there is no such piece.
QUAVER_DEVICE void sum_piece(const Entry& e, float scale, int64_t job, uint32_t& seen) {
  const int64_t subset = job / e.pieces, piece = job % e.pieces;
  const int lane = threadIdx.x % kWarp;
  const int64_t first = subset * e.width, begin = first + piece * kSubsetPiece;
  int64_t end = begin + kSubsetPiece;
  end = end < first + e.width ? end : first + e.width;
  end = end < e.numel ? end : e.numel;
  float sum = subset < e.count ? sum_of_squares(e, scale, {begin + lane, end, kWarp}, seen) : 0.0f;
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_xor_sync(kAllLanes, sum, half);
  if (lane != 0 || subset >= e.count) return;
  store_sum(e, subset, piece, sum);
}

// A block sums a piece of neighbouring columns.
QUAVER_DEVICE void sum_columns(const Entry& e, float scale, int64_t block, uint32_t& seen) {
  const int64_t k = block / e.pieces * kThreads + threadIdx.x, piece = block % e.pieces;
  if (k >= e.count) return;
  const int64_t first = piece * kStridedPiece * e.width;
  const int64_t left = e.numel - first, size = kStridedPiece * e.width;
  const int64_t end = first + (left < size ? left : size);
  store_sum(e, k, piece, sum_of_squares(e, scale, {first + k, end, e.width}, seen));
}

__global__ void __launch_bounds__(kThreads) sums_kernel(Problem p) {
  __shared__ Held<Entry> held;
  hold(held, p.table[owner_of(p.table, p.count, blockIdx.x)]);
  __syncthreads();
  const Entry& e = of(held);
  const int64_t block = blockIdx.x - e.first;
  const float scale = e.scale != nullptr ? *e.scale : 1.0f;
  uint32_t seen = 0;
  if (block == 0) {
    const bool finite = is_finite(scale) && (e.amax == nullptr || is_finite(*e.amax));
    if (!finite) seen = 0x7fc00000u;
  }
  if (e.strided)
    sum_columns(e, scale, block, seen);
  else
    sum_piece(e, scale, block * kWarps + threadIdx.x / kWarp, seen);
  block_atomic_max(p.amax + e.owner, seen);
}

__global__ void __launch_bounds__(kThreads) join_kernel(Problem p) {
  const Entry& e = p.table[owner_of(p.table, p.count, blockIdx.x)];
  const int64_t k = (blockIdx.x - e.first) * kThreads + threadIdx.x;
  if (k >= e.count) return;
  float sum = 0.0f;
  for (int64_t piece = 0; piece < e.pieces; ++piece) sum += e.partial[piece * e.count + k];
  e.sums[k] = sum;
}

// Elements without subsets are read as subsets of a piece, whose sums are not kept.
Entry make_entry(const SubsetGrad& g, int64_t owner, int64_t first, float* partial) {
  Entry e = {};
  const bool any = g.subsets.width != 0;
  e.grad = g.grad.values.data;
  e.type = g.grad.values.dtype;
  e.scale = g.grad.scale;
  e.amax = g.grad.amax;
  e.numel = g.grad.values.numel();
  e.strided = g.subsets.strided;
  // No wider than the gradient, so that no place in it overflows.
  e.width = std::min(any ? g.subsets.width : kSubsetPiece, std::max<int64_t>(e.numel, 1));
  e.count = any ? subset_count(g.subsets, e.numel) : ceil_div(e.numel, kSubsetPiece);
  const int64_t each = e.strided ? e.numel / e.width : e.width;
  e.pieces = std::max<int64_t>(ceil_div(each, e.strided ? kStridedPiece : kSubsetPiece), 1);
  e.sums = any ? g.sums : nullptr;
  e.partial = partial;
  e.first = first;
  e.owner = owner;
  return e;
}

// At least one, which sees the amax that a gradient carries.
int64_t block_count(const Entry& e) {
  return std::max<int64_t>(
      1, e.strided ? ceil_div(e.count, kThreads) * e.pieces : ceil_div(e.count * e.pieces, kWarps));
}

int64_t rounded(int64_t bytes) { return ceil_div(bytes, 16) * 16; }

int64_t partial_bytes(const Entry& e) {
  return e.pieces > 1 && e.sums != nullptr ? rounded(e.count * e.pieces * 4) : 0;
}

}  // namespace

int64_t subset_sums_workspace_bytes(const SubsetGrad* grads, int64_t count) {
  int64_t bytes = 2 * rounded(count * int64_t(sizeof(Entry)));
  for (int64_t i = 0; i < count; ++i) bytes += partial_bytes(make_entry(grads[i], i, 0, nullptr));
  return bytes;
}

void subset_sums(float* amax, const SubsetGrad* grads, int64_t count, void* workspace,
                 void* stream) {
  const char* op = "subset_sums";
  if (count == 0) return;
  const int64_t table_bytes = rounded(count * int64_t(sizeof(Entry)));
  auto* memory = static_cast<char*>(workspace);
  char* partial = memory + 2 * table_bytes;
  std::vector<Entry> entries, joined;
  int64_t blocks = 0, join_blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    check_subset_sums(grads[i]);
    entries.push_back(make_entry(grads[i], i, blocks, reinterpret_cast<float*>(partial)));
    const Entry& e = entries.back();
    blocks += block_count(e);
    partial += partial_bytes(e);
    if (partial_bytes(e) == 0) continue;
    joined.push_back(e);
    joined.back().first = join_blocks;
    join_blocks += ceil_div(e.count, kThreads);
  }
  upload(op, memory, entries.data(), count * int64_t(sizeof(Entry)), stream);
  clear(op, amax, count * 4, stream);
  launch(op, sums_kernel, blocks, kThreads, stream,
         Problem{reinterpret_cast<const Entry*>(memory), count, amax});
  if (joined.empty()) return;
  const auto late = static_cast<int64_t>(joined.size());
  upload(op, memory + table_bytes, joined.data(), late * int64_t(sizeof(Entry)), stream);
  launch(op, join_kernel, join_blocks, kThreads, stream,
         Problem{reinterpret_cast<const Entry*>(memory + table_bytes), late, amax});
}

}  // namespace quaver::cuda
