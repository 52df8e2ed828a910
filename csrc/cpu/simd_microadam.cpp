// MicroAdam of one block of 4096 flat elements, which stay in the first-level cache from the
// gradient to the weight. Compiled once per instruction set as simd.cpp is.
#include "simd_microadam.h"

#include "master.h"
#include "nibbles.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

constexpr int64_t kStrip = 32;  // elements that the search for kept ones rejects at once

// Calls body(error block, first, count) for the runs of a block that share an error range; `first`
// counts from `begin`.
template <class Body>
inline __attribute__((always_inline)) void for_runs(int64_t begin, int64_t n, int64_t error_block,
                                                    Body body) {
  for (int64_t i = 0; i < n;) {
    const int64_t block = (begin + i) / error_block;
    const int64_t end = (block + 1) * error_block - begin;
    const int64_t count = (end < n ? end : n) - i;
    body(block, i, count);
    i += count;
  }
}

void decode_errors(float* __restrict out, const MicroAdamSpan& s, const bf16* range, int64_t begin,
                   int64_t n) {
  alignas(64) uint8_t codes[kTopBlock + 1];
  unpack(codes, s.p.error + begin / 2, n);
  for_runs(begin, n, s.p.error_block, [&](int64_t block, int64_t first, int64_t count) {
    const ErrorCodec codec = error_codec(range[2 * block], range[2 * block + 1]);
    QUAVER_SIMD
    for (int64_t j = 0; j < count; ++j) out[first + j] = decode_error(codec, codes[first + j]);
  });
}

void encode_errors(const float* __restrict x, const MicroAdamSpan& s, int64_t begin, int64_t n) {
  alignas(64) uint8_t codes[kTopBlock + 1];
  codes[n] = 0;  // the other half of an odd tensor's last byte
  for_runs(begin, n, s.p.error_block, [&](int64_t block, int64_t first, int64_t count) {
    const ErrorCodec codec = error_codec(s.range[2 * block], s.range[2 * block + 1]);
    QUAVER_SIMD
    for (int64_t j = 0; j < count; ++j)
      codes[first + j] = static_cast<uint8_t>(encode_error(codec, x[first + j]));
  });
  pack(s.p.error + begin / 2, codes, n);
}

// a = the gradient with what is left of those before. The range of `e` is that of the last step.
void add_feedback(float* __restrict a, const MicroAdamSpan& s, int64_t begin, int64_t n) {
  alignas(64) float error[kTopBlock];
  decode_errors(error, s, s.p.range, begin, n);
  load_any(a, at(s.p.grad.data, s.p.grad.dtype, begin), s.p.grad.dtype, n, s.grad_scale);
  const MicroAdamStep step = s.step;
  QUAVER_SIMD
  for (int64_t j = 0; j < n; ++j) a[j] = with_feedback(step, a[j], error[j]);
}

inline int32_t magnitude(float x) { return static_cast<int32_t>(order_bits(x)); }

int64_t count_above(const int32_t* __restrict bits, int64_t n, int32_t bound) {
  int32_t count = 0;
  _Pragma("omp simd reduction(+ : count)") for (int64_t j = 0; j < n; ++j) count += bits[j] > bound;
  return count;
}

// Every magnitude above `above` is kept, and the first `ties` that equal it.
struct Threshold {
  int32_t above;
  int64_t ties;
};

// By bisection. `low` must have `kept` magnitudes or more above it.
Threshold threshold_of(const int32_t* bits, int64_t n, int64_t kept, int32_t low) {
  int32_t high = 0;
  _Pragma("omp simd reduction(max : high)") for (int64_t j = 0; j < n; ++j) high =
      high < bits[j] ? bits[j] : high;
  int64_t above_high = 0;  // fewer than `kept`
  while (low + 1 < high) {
    const auto middle = static_cast<int32_t>((int64_t(low) + high) >> 1);
    const int64_t above = count_above(bits, n, middle);
    if (above == kept) return {middle, 0};
    if (above > kept) {
      low = middle;
    } else {
      high = middle;
      above_high = above;
    }
  }
  return {high, kept - above_high};
}

// A block's magnitudes, and the largest of each strip.
struct Magnitudes {
  alignas(64) int32_t bits[kTopBlock];
  alignas(64) int32_t most[kTopBlock / kStrip];
  int64_t n, strips;
};

void read_magnitudes(Magnitudes& m, const float* __restrict a, int64_t n) {
  m.n = n;
  m.strips = (n + kStrip - 1) / kStrip;
  QUAVER_SIMD
  for (int64_t j = 0; j < n; ++j) m.bits[j] = magnitude(a[j]);
  for (int64_t j = n; j < m.strips * kStrip; ++j) m.bits[j] = -1;
  for (int64_t k = 0; k < m.strips; ++k) {
    int32_t most = -1;
    const int32_t* bits = m.bits + k * kStrip;
    _Pragma("omp simd reduction(max : most)") for (int64_t j = 0; j < kStrip; ++j) most =
        most < bits[j] ? bits[j] : most;
    m.most[k] = most;
  }
}

// As many strips as values are kept have their largest above the bound that these give, so that
// the threshold is not below it, and few magnitudes have to be searched.
Threshold threshold_of(const Magnitudes& m, int64_t kept) {
  if (kept == m.n) return {-1, 0};
  if (kept > m.strips) return threshold_of(m.bits, m.n, kept, -1);
  const Threshold of_strips = threshold_of(m.most, m.strips, kept, -1);
  const int32_t bound = of_strips.above - (of_strips.ties > 0);
  alignas(64) int32_t candidates[kTopBlock + 1];
  int64_t count = 0;
  for (int64_t k = 0; k < m.strips; ++k) {
    if (m.most[k] <= bound) continue;
    for (int64_t j = k * kStrip; j < (k + 1) * kStrip; ++j) {
      candidates[count] = m.bits[j];
      count += m.bits[j] > bound;
    }
  }
  return threshold_of(candidates, count, kept, bound);
}

// Writes the row of the ring.
void keep_largest(const float* __restrict a, int16_t* __restrict index, bf16* __restrict value,
                  int64_t n, int64_t kept) {
  Magnitudes m;
  read_magnitudes(m, a, n);
  Threshold t = threshold_of(m, kept);
  const int32_t least = t.above + (t.ties == 0);
  int64_t at = 0;
  for (int64_t k = 0; k < m.strips && at < kept; ++k) {
    if (m.most[k] < least) continue;
    for (int64_t j = k * kStrip; j < (k + 1) * kStrip && j < n; ++j) {
      if (m.bits[j] < least) continue;
      if (m.bits[j] == t.above && t.ties-- <= 0) continue;
      index[at] = static_cast<int16_t>(j);
      value[at++] = encode_nearest<bf16>(a[j]);
    }
  }
}

void subtract_kept(float* __restrict a, const int16_t* __restrict index,
                   const bf16* __restrict value, int64_t kept) {
  for (int64_t k = 0; k < kept; ++k) a[index[k] & (kTopBlock - 1)] -= decode(value[k]);
}

OrderRange range_of(const float* x, int64_t n) {
  int32_t low = kMostOrder, high = kLeastOrder;
  _Pragma("omp simd reduction(min : low) reduction(max : high)") for (int64_t j = 0; j < n; ++j) {
    const int32_t order = order_of(x[j]);
    low = order < low ? order : low;
    high = high < order ? order : high;
  }
  return {low, high};
}

void find_ranges(const float* a, const MicroAdamSpan& s, int64_t begin, int64_t n, bool inside) {
  OrderRange* partial = inside ? nullptr : s.partial + 2 * (begin / kTopBlock);
  for_runs(begin, n, s.p.error_block, [&](int64_t block, int64_t first, int64_t count) {
    const OrderRange r = range_of(a + first, count);
    if (!inside) {
      *partial++ = r;
      return;
    }
    s.p.range[2 * block] = range_low(r.low, r.high);
    s.p.range[2 * block + 1] = range_high(r.high);
  });
}

// Steps of a block's elements that are in a row of the ring, each once.
struct SparseSteps {
  alignas(64) float step[kTopBlock];
  int32_t place[kTopBlock];
  int64_t count = 0;
};

void sum_rows(SparseSteps& steps, const MicroAdamSpan& s, int64_t at, int64_t kept) {
  alignas(64) float first[kTopBlock], second[kTopBlock], sums[kTopBlock + 1];
  memset(first, 0, sizeof(first));
  memset(second, 0, sizeof(second));
  for (int64_t r = 0; r < s.step.rows; ++r) {
    const RowWeight weight = row_weight(s.step, r);
    const int16_t* index = s.p.index + r * s.p.row + at;
    const bf16* value = s.p.value + r * s.p.row + at;
    for (int64_t k = 0; k < kept; ++k) {
      const int64_t i = index[k] & (kTopBlock - 1);
      const SparseMoments z = add_value({first[i], second[i]}, weight, decode(value[k]));
      first[i] = z.first;
      second[i] = z.second;
    }
  }
  constexpr float taken = -1.0f;  // no sum of squares
  int64_t count = 0;
  for (int64_t r = 0; r < s.step.rows; ++r) {
    const int16_t* index = s.p.index + r * s.p.row + at;
    for (int64_t k = 0; k < kept; ++k) {
      const int32_t i = index[k] & (kTopBlock - 1);
      if (second[i] == taken) continue;
      steps.place[count] = i;
      steps.step[count] = first[i];
      sums[count++] = second[i];
      second[i] = taken;
    }
  }
  const MicroAdamStep step = s.step;
  QUAVER_SIMD
  for (int64_t j = 0; j < count; ++j) steps.step[j] = sparse_update(step, {steps.step[j], sums[j]});
  steps.count = count;
}

Master master_of(const MicroAdamSpan& s) {
  return {s.p.weight, s.p.remainder, s.p.stochastic, s.dither};
}

// w of a block; `a` is used as memory.
void update_weight(float* __restrict a, const MicroAdamSpan& s, int64_t begin, int64_t n,
                   int64_t at, int64_t kept) {
  alignas(64) float dense[kTopBlock], w[kTopBlock];
  SparseSteps steps;
  const MicroAdamStep step = s.step;
  sum_rows(steps, s, at, kept);
  if (s.p.weight.dtype == DType::f32 && step.decay == 1.0f && step.feedback == 0.0f) {
    float* weight = s.p.weight.as<float>() + begin;  // only these change
    for (int64_t k = 0; k < steps.count; ++k) {
      const int64_t i = steps.place[k];
      if (i < n) weight[i] = micro_adam_weight(step, weight[i], steps.step[k], 0.0f);
    }
    return;
  }
  memset(dense, 0, sizeof(dense));
  for (int64_t k = 0; k < steps.count; ++k) dense[steps.place[k]] = steps.step[k];
  load_master(w, master_of(s), begin, n);
  if (step.feedback != 0.0f) {
    decode_errors(a, s, s.range, begin, n);
    QUAVER_SIMD
    for (int64_t j = 0; j < n; ++j) w[j] = micro_adam_weight(step, w[j], dense[j], a[j]);
  } else {
    QUAVER_SIMD
    for (int64_t j = 0; j < n; ++j) w[j] = micro_adam_weight(step, w[j], dense[j], 0.0f);
  }
  store_master(master_of(s), w, begin, n);
}

void block(const MicroAdamSpan& s, int64_t b, MicroAdamPart part) {
  alignas(64) float a[kTopBlock];
  const int64_t begin = b * kTopBlock, numel = s.p.weight.numel();
  const int64_t n = numel - begin < kTopBlock ? numel - begin : kTopBlock;
  const int64_t kept = kept_of(numel, s.p.row, s.p.kept, b), at = b * s.p.kept;
  int16_t* index = s.p.index + s.step.slot * s.p.row + at;
  bf16* value = s.p.value + s.step.slot * s.p.row + at;
  add_feedback(a, s, begin, n);
  if (part != MicroAdamPart::store) keep_largest(a, index, value, n, kept);
  subtract_kept(a, index, value, kept);
  if (part != MicroAdamPart::store) find_ranges(a, s, begin, n, part == MicroAdamPart::all);
  if (part == MicroAdamPart::keep) return;
  encode_errors(a, s, begin, n);
  update_weight(a, s, begin, n, at, kept);
}

}  // namespace

extern const MicroAdamSimd micro_adam_table;
const MicroAdamSimd micro_adam_table = {block};

}  // namespace quaver::cpu::QUAVER_ISA
