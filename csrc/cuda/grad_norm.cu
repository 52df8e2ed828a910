// Norm, finite check and amaxes of all gradients in one read, summed in f64 in the CPU's order (see
// quaver/grad.h): a warp sums a piece, one block sums the pieces. A thread of the warp sums fours
// of the 512 lanes, so that its loads are dense; at a piece's end threads exchange sums, until each
// has 16 lanes in a row, which the order adds first.
#include <vector>

#include "../arguments.h"
#include "list_runs.h"
#include "quaver/grad.h"
#include "tensor_list.h"

namespace quaver::cuda {
namespace {

static_assert(kNormLanes == kWarp * kVector, "a lane of the sum is a register of the warp");
static_assert(kNormStrands == kThreads, "a strand of the sum is a thread of the last block");
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kApart = kWarp * kQuad;  // of a thread's fours

struct Entry {
  const void* data;
  const float* scale;  // null: 1
  const float* amax;   // null: its own
  int64_t numel, first;
  DType type;
  bool aligned;
};

struct Problem {
  const Entry* table;
  int64_t count, pieces;
  double* partial;
  float* norm;
  float* amax;
};

QUAVER_DEVICE float scale_of(const Entry& e) { return e.scale != nullptr ? *e.scale : 1.0f; }

// Exchanges fours that are kFours apart with the thread that is: the bits of a four's number change
// places with the low bits of the thread's.
template <int kFours>
QUAVER_DEVICE void exchange_fours(double (&lanes)[kVector]) {
  const bool odd = (threadIdx.x & kFours) != 0;
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    if (k / kQuad & kFours) continue;
    const double low = lanes[k], high = lanes[k + kFours * kQuad];
    const double other = __shfl_xor_sync(kAllLanes, odd ? low : high, kFours);
    lanes[k] = odd ? other : low;
    lanes[k + kFours * kQuad] = odd ? high : other;
  }
}

// The sum of all lanes, in every thread. Thread t of the order, which has 16 lanes in a row, is the
// one whose number is t with its bits turned by two.
QUAVER_DEVICE double sum_of(double (&lanes)[kVector]) {
  exchange_fours<1>(lanes);
  exchange_fours<2>(lanes);
  double sum = 0.0;
#pragma unroll
  for (int k = 0; k < kVector; ++k) sum += lanes[k];
#pragma unroll
  for (const int distance : {2, 1, 16, 8, 4}) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

__global__ void __launch_bounds__(kThreads) piece_kernel(Problem p) {
  const int64_t piece = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (piece >= p.pieces) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t owner = owner_of(p.table, p.count, piece);
  const Entry& e = p.table[owner];
  const int64_t begin = (piece - e.first) * kNormPiece;
  const int64_t left = e.numel - begin;
  const int64_t n = left < kNormPiece ? left : kNormPiece;
  double lanes[kVector] = {};
  uint32_t seen = 0;
  for (int64_t i = lane * kQuad; i < n; i += kNormLanes) {
    const AnyPacked v = load_any_fours(e.data, e.type, begin + i, kApart, n - i, e.aligned);
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      float x[kQuad];
      decode_any(e.type, v, quad, 1.0f, x);
      seen = max_bits(seen, amax_bits(x));
#pragma unroll
      for (int k = 0; k < kQuad; ++k) lanes[quad * kQuad + k] += double(x[k]) * double(x[k]);
    }
  }
  const double sum = sum_of(lanes);
  seen = __reduce_max_sync(kAllLanes, seen);
  if (lane != 0) return;
  const double scale = scale_of(e);
  p.partial[piece] = sum * scale * scale;
  atomicMax(reinterpret_cast<uint32_t*>(p.amax + owner), seen);
}

__global__ void __launch_bounds__(kThreads) total_kernel(Problem p) {
  __shared__ double strands[kNormStrands];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < p.pieces; i += kNormStrands) sum += p.partial[i];
  strands[threadIdx.x] = sum;
  bool bad = false;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads) {
    const Entry& e = p.table[i];
    const bool carried = e.amax == nullptr || is_finite(*e.amax);
    p.amax[i] = carried ? p.amax[i] * ::fabsf(scale_of(e)) : bit_cast<float>(0x7fc00000u);
    bad = bad || !carried;
  }
  bad = __syncthreads_or(bad);
  for (int half = kNormStrands / 2; half > 0; half /= 2) {
    if (int(threadIdx.x) < half) strands[threadIdx.x] += strands[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0)
    *p.norm = bad ? bit_cast<float>(0x7fc00000u) : static_cast<float>(::sqrt(strands[0]));
}

int64_t piece_count(const ScaledView* grads, int64_t count) {
  int64_t pieces = 0;
  for (int64_t t = 0; t < count; ++t) pieces += ceil_div(grads[t].values.numel(), kNormPiece);
  return pieces;
}

int64_t table_bytes(int64_t count) { return ceil_div(count * int64_t(sizeof(Entry)), 16) * 16; }

}  // namespace

int64_t grad_norm_workspace_bytes(const ScaledView* grads, int64_t count) {
  return table_bytes(count) + piece_count(grads, count) * int64_t(sizeof(double));
}

void grad_norm(float* norm, float* amax, const ScaledView* grads, int64_t count, void* workspace,
               void* stream) {
  const char* op = "grad_norm";
  std::vector<Entry> entries(static_cast<size_t>(count));
  int64_t pieces = 0;
  for (int64_t t = 0; t < count; ++t) {
    const ScaledView& g = grads[t];
    const int64_t n = g.values.numel();
    entries[t] = {
        g.values.data, g.scale, g.amax, n, pieces, g.values.dtype, is_aligned(g.values.data)};
    pieces += ceil_div(n, kNormPiece);
  }
  upload(op, workspace, entries.data(), count * int64_t(sizeof(Entry)), stream);
  clear(op, amax, count * int64_t(sizeof(float)), stream);
  auto* memory = static_cast<char*>(workspace);
  const Problem p{reinterpret_cast<const Entry*>(memory),
                  count,
                  pieces,
                  reinterpret_cast<double*>(memory + table_bytes(count)),
                  norm,
                  amax};
  if (pieces > 0) launch(op, piece_kernel, ceil_div(pieces, kWarps), kThreads, stream, p);
  launch(op, total_kernel, 1, kThreads, stream, p);
}

}  // namespace quaver::cuda
