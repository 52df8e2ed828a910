// Rotary positions of heads, with heads that are copied beside them (quaver/rotate.h). A warp takes
// a row, and its threads the same columns of several heads, so that each reads its part of cos and
// sin once for all of them.
#include "quaver/rotate.h"
#include "runs.h"

namespace quaver::cuda {
namespace {

constexpr int kRun = kVector / 2;  // a thread's values of each half of a head
constexpr int kWarps = kThreads / kWarp;

struct Problem {
  Rotation r;
  int64_t rows, heads;
  int chunks;  // of a half
  bool aligned, aligned_table;
};

// The first value of a head of a row. The parts are told apart by comparisons: an index would put
// them into memory.
template <class X>
QUAVER_DEVICE const X* head_of(const Rotation& r, int64_t batch, int64_t position, int64_t head) {
  HeadsView part = r.part[0];
#pragma unroll
  for (int k = 1; k < kMostParts; ++k) {
    if (k >= r.parts || head < part.heads) continue;
    head -= part.heads;
    part = r.part[k];
  }
  return static_cast<const X*>(part.data) + batch * part.batch_stride + position * part.row_stride +
         head * part.head_stride;
}

// A thread's values of both halves, of which n are in each. Aligned ones are whole.
template <class T>
QUAVER_DEVICE Packed<sizeof(T)> load_halves(const T* from, int64_t half, int64_t n, bool aligned) {
  constexpr int kWords = kRun * int(sizeof(T)) / 4, per_word = 4 / int(sizeof(T));
  Packed<sizeof(T)> v = {};
  if (aligned) {
    load_words<kWords>(from, v.word);
    load_words<kWords>(from + half, v.word + kWords);
    return v;
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    if (j % kRun < n)
      v.word[j / per_word] |=
          uint32_t(reinterpret_cast<const Bits<T>*>(from)[place_in_runs<kRun>(j, half)])
          << j % per_word * (32 / per_word);
  return v;
}

template <class T>
QUAVER_DEVICE void store_halves(T* to, const Packed<sizeof(T)>& v, int64_t half, int64_t n,
                                bool aligned) {
  constexpr int kWords = kRun * int(sizeof(T)) / 4, per_word = 4 / int(sizeof(T));
  if (aligned) {
    store_at_once<kWords>(to, v.word);
    store_at_once<kWords>(to + half, v.word + kWords);
    return;
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    if (j % kRun < n)
      reinterpret_cast<Bits<T>*>(to)[place_in_runs<kRun>(j, half)] =
          static_cast<Bits<T>>(v.word[j / per_word] >> j % per_word * (32 / per_word));
}

template <class X>
__global__ void __launch_bounds__(kThreads) rotate_kernel(const __grid_constant__ Problem p) {
  const Rotation& r = p.r;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int width = p.chunks < kWarp ? p.chunks : kWarp, at_once = kWarp / width;
  if (row >= p.rows || lane >= width * at_once) return;
  const int64_t batch = row / r.length, position = row - batch * r.length, half = r.head_dim / 2;
  const float sign = r.inverse ? -1.0f : 1.0f;
  for (int chunk = lane % width; chunk < p.chunks; chunk += width) {
    const int64_t col = int64_t(chunk) * kRun, n = half - col, at = position * r.head_dim + col;
    float cos[kVector], sin[kVector];
    decode_vector<float>(load_halves(r.cos + at, half, n, p.aligned_table), cos);
    decode_vector<float>(load_halves(r.sin + at, half, n, p.aligned_table), sin);
    for (int64_t head = lane / width; head < p.heads; head += at_once) {
      const X* from = head_of<X>(r, batch, position, head) + col;
      Packed<sizeof(X)> v = load_halves(from, half, n, p.aligned);
      if (head < r.turned) {
        float x[kVector], y[kVector];
        decode_vector<X>(v, x);
#pragma unroll
        for (int k = 0; k < kVector; ++k)
          y[k] = x[k] * cos[k] + sign * (x[(k + kRun) % kVector] * sin[k]);
        encode_vector<X>(y, v);
      }
      X* to = static_cast<X*>(r.out) + (row * p.heads + head) * r.head_dim + col;
      store_halves(to, v, half, n, p.aligned);
    }
  }
}

bool are_aligned(const Rotation& r) {
  bool aligned = r.head_dim % kVector == 0 && is_aligned(r.out);
  for (int k = 0; k < r.parts; ++k) {
    const HeadsView& part = r.part[k];
    aligned = aligned && is_aligned(part.data) && part.batch_stride % kRun == 0 &&
              part.row_stride % kRun == 0 && part.head_stride % kRun == 0;
  }
  return aligned;
}

}  // namespace

void rotate(const Rotation& r, void* stream) {
  const char* op = "rotate";
  check_rotation(r);
  if (r.numel() == 0) return;
  const int64_t chunks = ceil_div(r.head_dim / 2, kRun);
  QUAVER_CHECK(chunks >> 31 == 0, op, ": a head is too long, got ", r.head_dim, " values");
  const Problem p = {r,
                     r.batch * r.length,
                     r.heads(),
                     static_cast<int>(chunks),
                     are_aligned(r),
                     r.head_dim % kVector == 0 && is_aligned(r.cos) && is_aligned(r.sin)};
  const int64_t blocks = ceil_div(p.rows, kWarps);
  if (r.dtype == DType::f32)
    launch(op, rotate_kernel<float>, blocks, kThreads, stream, p);
  else
    launch(op, rotate_kernel<bf16>, blocks, kThreads, stream, p);
}

}  // namespace quaver::cuda
