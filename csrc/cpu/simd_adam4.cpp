// Adam with moments of 4 bits, compiled once per instruction set as simd.cpp is. Runs of one group
// go through f32 buffers in the first-level cache.
#include "simd_adam4.h"

#include <algorithm>

#include "master.h"
#include "nibbles.h"
#include "spans.h"

// gcc 12 warns of undefined behaviour in remainder loops, which whole runs never enter.
#pragma GCC diagnostic ignored "-Waggressive-loop-optimizations"

namespace quaver::cpu::QUAVER_ISA {
namespace {

constexpr int64_t kRun = kGroup;

// What the codes decode to, over their scales.
struct Levels {
  float dynamic[16] = {}, linear[16] = {};

  constexpr Levels() {
    for (uint32_t code = 0; code < 16; ++code) {
      dynamic[code] = decode_dynamic4(code);
      linear[code] = decode_linear4(code);
    }
  }
};

// Known when compiled: code that ran at load would stop a CPU without these instructions.
constexpr Levels levels;

// A whole run has loops of a constant count, which have no remainders.
template <class Body>
inline __attribute__((always_inline)) void with_count(int64_t count, Body body) {
  if (count == kRun) return body(kRun);
  body(count < kRun ? count : kRun);
}

// Calls body(row, column, first, n) for the parts of a run that lie in one row.
template <class Body>
inline __attribute__((always_inline)) void for_rows(const Shape& shape, int64_t begin,
                                                    int64_t count, Body body) {
  const int64_t columns = columns_of(shape);
  int64_t row = begin / columns, column = begin % columns;
  for (int64_t i = 0; i < count;) {
    const int64_t n = std::min(count - i, columns - column);
    body(row, column, i, n);
    i += n;
    ++row;
    column = 0;
  }
}

// The scales of a rank-1 second moment's run.
void spread_scales(float* __restrict out, const Shape& shape, const float* maxima, int64_t begin,
                   int64_t count) {
  const float* columns = maxima + column_slots(shape);
  for_rows(shape, begin, count, [&](int64_t row, int64_t column, int64_t first, int64_t n) {
    const float scale = row_scale(shape, maxima, row);
    QUAVER_SIMD
    for (int64_t j = 0; j < n; ++j) out[first + j] = least_of(scale, columns[column + j]);
  });
}

void spread_factors(float* __restrict out, const Adam4Span& s, int64_t begin, int64_t count) {
  const Shape& shape = s.p.shape;
  const float* factors = s.p.exp_avg_sq_scale;
  const int64_t rows = s.p.weight.numel() / columns_of(shape);
  for_rows(shape, begin, count, [&](int64_t row, int64_t column, int64_t first, int64_t n) {
    const float of_row = factors[row];
    const float* columns = factor_columns(shape, factors, rows, row) + column;
    QUAVER_SIMD
    for (int64_t j = 0; j < n; ++j) out[first + j] = of_row * columns[j];
  });
}

// The gradient of a run: where it lies, if that is as f32, else in `buffer`.
const float* gradient(float* buffer, const Adam4Span& s, int64_t begin, int64_t count) {
  const DType type = s.p.grad.dtype;
  const void* from = at(s.p.grad.data, type, begin);
  prefetch(from, count * size_of(type));
  if (type == DType::f32 && s.grad_scale == 1.0f) return static_cast<const float*>(from);
  load_any(buffer, from, type, count, s.grad_scale);
  return buffer;
}

// This step's second moment of a run.
void next_second(float* __restrict v, const Adam4Span& s, const float* __restrict g, int64_t begin,
                 int64_t count) {
  if (s.p.second == Second::factor) return spread_factors(v, s, begin, count);
  alignas(64) float scales[kRun];
  if (s.p.second == Second::rank1)
    spread_scales(scales, s.p.shape, s.p.exp_avg_sq_scale, begin, count);
  else
    std::fill_n(scales, count, s.p.exp_avg_sq_scale[begin / kGroup]);
  look_up(v, s.p.exp_avg_sq + begin / 2, count, levels.linear);
  const AdamStep step = s.step;
  with_count(count, [&](int64_t n) {
    QUAVER_SIMD
    for (int64_t j = 0; j < n; ++j) v[j] = next_exp_avg_sq(step, v[j] * scales[j], g[j]);
  });
}

// Signed, because AVX2 compares no unsigned integers.
inline int32_t amax_bits(float x) { return static_cast<int32_t>(range_bits(x)); }

float amax_of(const float* x, int64_t n) {
  int32_t most = 0;
  _Pragma("omp simd reduction(max : most)") for (int64_t j = 0; j < n; ++j) {
    const int32_t bits = amax_bits(x[j]);
    most = most < bits ? bits : most;
  }
  return bit_cast<float>(most);
}

void encode_first(const Adam4Span& s, const float* __restrict m, int64_t begin, int64_t count) {
  alignas(64) uint8_t codes[kRun] = {};
  const float scale = amax_of(m, count);
  s.p.exp_avg_scale[begin / kGroup] = scale;
  with_count(count, [&](int64_t n) {
    QUAVER_SIMD
    for (int64_t j = 0; j < n; ++j)
      codes[j] = static_cast<uint8_t>(encode_dynamic4(over_scale(m[j], scale)));
  });
  pack(s.p.exp_avg + begin / 2, codes, count);
}

void encode_second(const Adam4Span& s, const float* __restrict v, int64_t begin, int64_t count) {
  if (s.p.second == Second::factor) return;
  alignas(64) uint8_t codes[kRun] = {};
  alignas(64) float scales[kRun];
  if (s.p.second == Second::rank1) {
    spread_scales(scales, s.p.shape, s.new_maxima, begin, count);
  } else {
    const float scale = amax_of(v, count);
    s.p.exp_avg_sq_scale[begin / kGroup] = scale;
    std::fill_n(scales, count, scale);
  }
  with_count(count, [&](int64_t n) {
    QUAVER_SIMD
    for (int64_t j = 0; j < n; ++j)
      codes[j] = static_cast<uint8_t>(encode_linear4(over_scale(v[j], scales[j])));
  });
  pack(s.p.exp_avg_sq + begin / 2, codes, count);
}

void step_run(const Adam4Span& s, int64_t begin, int64_t count) {
  alignas(64) float m[kRun], v[kRun], weights[kRun], values[kRun];
  const Master master = {s.p.weight, s.p.remainder, s.p.stochastic, s.dither};
  const float* g = gradient(values, s, begin, count);
  const bool in_place = s.p.weight.dtype == DType::f32;
  float* w = in_place ? s.p.weight.as<float>() + begin : weights;
  if (!in_place) load_master(w, master, begin, count);
  look_up(m, s.p.exp_avg + begin / 2, count, levels.dynamic);
  next_second(v, s, g, begin, count);
  const AdamStep step = s.step;
  const float scale = s.p.exp_avg_scale[begin / kGroup];
  with_count(count, [&](int64_t n) {
    QUAVER_SIMD
    for (int64_t j = 0; j < n; ++j) {
      const AdamElement e = adamw_under(step, {w[j], m[j] * scale, v[j]}, g[j]);
      w[j] = e.weight;
      m[j] = e.exp_avg;
    }
  });
  if (!in_place) store_master(master, w, begin, count);
  encode_first(s, m, begin, count);
  encode_second(s, v, begin, count);
}

void step(const Adam4Span& s, int64_t begin, int64_t n) {
  const Adam4Span span = s;
  for (int64_t i = 0; i < n; i += kRun) step_run(span, begin + i, std::min(kRun, n - i));
}

void find_maxima(const Adam4Span& span, int64_t begin, int64_t n, int32_t* of_column) {
  const Adam4Span s = span;
  const Shape& shape = s.p.shape;
  const int64_t columns = columns_of(shape), width = std::min(columns, n);
  alignas(64) float v[kRun], values[kRun];
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t count = std::min(kRun, n - i);
    next_second(v, s, gradient(values, s, begin + i, count), begin + i, count);
    for_rows(shape, begin + i, count, [&](int64_t row, int64_t, int64_t first, int64_t part) {
      int32_t most = 0;
      for (int64_t j = 0; j < part;) {
        const int64_t place = (i + first + j) % width;
        const int64_t run = std::min(part - j, width - place);
        int32_t* __restrict of = of_column + place;
        const float* x = v + first + j;
        _Pragma("omp simd reduction(max : most)") for (int64_t k = 0; k < run; ++k) {
          const int32_t bits = amax_bits(x[k]);
          most = most < bits ? bits : most;
          of[k] = of[k] < bits ? bits : of[k];
        }
        j += run;
      }
      for_slices(shape, row,
                 [&](int64_t slot) { s.maxima[slot].add(static_cast<uint32_t>(most)); });
    });
  }
  for (int64_t k = 0; k < width; ++k)
    s.maxima[column_slots(shape) + (begin + k) % columns].add(static_cast<uint32_t>(of_column[k]));
}

}  // namespace

extern const Adam4Simd adam4_table;
const Adam4Simd adam4_table = {find_maxima, step};

}  // namespace quaver::cpu::QUAVER_ISA
