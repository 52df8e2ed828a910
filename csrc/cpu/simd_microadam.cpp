// MicroAdam of one block of 4096 flat elements, which stay in the first-level cache from the
// gradient to the weight. Compiled once per instruction set as simd.cpp is.
#include "simd_microadam.h"

#include "span.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

constexpr int64_t kStrip = 32;  // elements that the search for kept ones rejects at once

// Codes of elements begin.. of an error, one a byte.
void unpack(uint8_t* __restrict codes, const uint8_t* __restrict packed, int64_t n) {
  const int64_t bytes = (n + 1) / 2;
  QUAVER_SIMD
  for (int64_t j = 0; j < bytes; ++j) {
    codes[2 * j] = packed[j] & 15;
    codes[2 * j + 1] = packed[j] >> 4;
  }
}

void pack(uint8_t* __restrict packed, const uint8_t* __restrict codes, int64_t n) {
  const int64_t bytes = (n + 1) / 2;
  QUAVER_SIMD
  for (int64_t j = 0; j < bytes; ++j)
    packed[j] = static_cast<uint8_t>(codes[2 * j] | codes[2 * j + 1] << 4);
}

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

inline int32_t magnitude(float x) {
  return static_cast<int32_t>(bit_cast<uint32_t>(x) & 0x7fffffffu);
}

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

Threshold threshold_of(const int32_t* bits, int64_t n, int64_t kept) {
  int32_t high = 0;
  _Pragma("omp simd reduction(max : high)") for (int64_t j = 0; j < n; ++j) high =
      high < bits[j] ? bits[j] : high;
  // More than `kept` magnitudes are above `low` and fewer above `high`.
  int64_t above_high = 0;
  if (kept == n) return {-1, 0};
  for (int32_t low = -1; high - low > 1;) {
    const int32_t middle = low + (high - low) / 2;
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

// Writes the row of the ring and leaves in `a` what is not kept.
void keep_largest(float* __restrict a, int16_t* __restrict index, bf16* __restrict value, int64_t n,
                  int64_t kept) {
  alignas(64) int32_t bits[kTopBlock];
  QUAVER_SIMD
  for (int64_t j = 0; j < n; ++j) bits[j] = magnitude(a[j]);
  Threshold t = threshold_of(bits, n, kept);
  const int32_t least = t.above + (t.ties == 0);
  int64_t at = 0;
  for (int64_t i = 0; i < n && at < kept; i += kStrip) {
    const int64_t end = i + kStrip < n ? i + kStrip : n;
    if (end - i == kStrip && count_above(bits + i, kStrip, least - 1) == 0) continue;
    for (int64_t j = i; j < end; ++j) {
      if (bits[j] < least) continue;
      if (bits[j] == t.above && t.ties-- <= 0) continue;
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
    s.p.range[2 * block] = bf16_below(at_order(r.low));
    s.p.range[2 * block + 1] = bf16_above(at_order(r.high));
  });
}

// Steps of a block's elements from the ring, 0 of those in no row.
void sum_rows(float* __restrict update, const MicroAdamSpan& s, int64_t at, int64_t kept) {
  alignas(64) float second[kTopBlock];
  memset(update, 0, sizeof(second));
  memset(second, 0, sizeof(second));
  for (int64_t r = 0; r < s.step.rows; ++r) {
    const RowWeight weight = row_weight(s.step, r);
    const int16_t* index = s.p.index + r * s.p.row + at;
    const bf16* value = s.p.value + r * s.p.row + at;
    for (int64_t k = 0; k < kept; ++k) {
      const int64_t i = index[k] & (kTopBlock - 1);
      const SparseMoments z = add_value({update[i], second[i]}, weight, decode(value[k]));
      update[i] = z.first;
      second[i] = z.second;
    }
  }
  if (s.step.rows * kept >= kTopBlock) {
    QUAVER_SIMD
    for (int64_t j = 0; j < kTopBlock; ++j)
      update[j] = sparse_update(s.step, {update[j], second[j]});
    return;
  }
  for (int64_t r = 0; r < s.step.rows; ++r) {
    const int16_t* index = s.p.index + r * s.p.row + at;
    for (int64_t k = 0; k < kept; ++k) {
      const int64_t i = index[k] & (kTopBlock - 1);
      if (second[i] < 0.0f) continue;  // an earlier row had it
      update[i] = sparse_update(s.step, {update[i], second[i]});
      second[i] = -1.0f;
    }
  }
}

template <class T>
void store_stochastic(const MicroAdamSpan& s, const float* w, int64_t begin, int64_t n) {
  const Dither d = s.dither;
  auto* out = s.p.weight.as<T>() + begin;
  const auto low = static_cast<uint32_t>(begin), high = static_cast<uint32_t>(begin >> 32);
  QUAVER_SIMD
  for (int64_t j = 0; j < n; ++j) {
    // A block begins at a multiple of 4096, so that the lower half of its indices does not wrap.
    const uint32_t start = dither_start(d, low + static_cast<uint32_t>(j), high);
    out[j] = encode_weight_stochastic<T>(w[j], weight_noise(d, start));
  }
}

void load_weight(float* __restrict w, const MicroAdamSpan& s, int64_t begin, int64_t n) {
  const TensorView& weight = s.p.weight;
  if (s.p.remainder == nullptr)
    return load_any(w, at(weight.data, weight.dtype, begin), weight.dtype, n, 1.0f);
  const bf16* high = weight.as<bf16>() + begin;
  const uint16_t* low = s.p.remainder + begin;
  QUAVER_SIMD
  for (int64_t j = 0; j < n; ++j) w[j] = join_master(high[j], low[j]);
}

void store_weight(const MicroAdamSpan& s, const float* __restrict w, int64_t begin, int64_t n) {
  const TensorView& weight = s.p.weight;
  if (s.p.stochastic)
    return weight.dtype == DType::bf16 ? store_stochastic<bf16>(s, w, begin, n)
                                       : store_stochastic<f16>(s, w, begin, n);
  if (s.p.remainder == nullptr)
    return store_any(at(weight.data, weight.dtype, begin), weight.dtype, w, n, 1.0f);
  bf16* high = weight.as<bf16>() + begin;
  uint16_t* low = s.p.remainder + begin;
  QUAVER_SIMD
  for (int64_t j = 0; j < n; ++j) {
    high[j] = master_high(w[j]);
    low[j] = master_low(w[j]);
  }
}

// w of a block; `a` is used as memory.
void update_weight(float* __restrict a, const MicroAdamSpan& s, int64_t begin, int64_t n,
                   int64_t at, int64_t kept) {
  alignas(64) float update[kTopBlock], w[kTopBlock];
  const MicroAdamStep step = s.step;
  const bool feeds_back = step.feedback != 0.0f;
  sum_rows(update, s, at, kept);
  load_weight(w, s, begin, n);
  if (feeds_back) decode_errors(a, s, s.range, begin, n);
  if (feeds_back) {
    QUAVER_SIMD
    for (int64_t j = 0; j < n; ++j) w[j] = micro_adam_weight(step, w[j], update[j], a[j]);
  } else {
    QUAVER_SIMD
    for (int64_t j = 0; j < n; ++j) w[j] = micro_adam_weight(step, w[j], update[j], 0.0f);
  }
  store_weight(s, w, begin, n);
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
