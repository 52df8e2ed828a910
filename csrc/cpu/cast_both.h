// Casts matrices as they are computed, to both GEMM layouts (quaver/cast.h): a strip of rows at a
// time, whose codes are transposed while they are in cache.
#pragma once

#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "quaver/cast.h"
#include "simd.h"

namespace quaver::cpu {

inline const char* at(const TensorView& x, int64_t i) {
  return x.as<const char>() + i * size_of(x.dtype);
}

// Rows whose codes are transposed together.
struct Strip {
  int64_t row, rows;
};

constexpr int kMaxOutputs = 2;

struct CastState {
  float factor = 1.0f;  // of the encoding: the reciprocal of the scale where that is exact
  bool divide = false;
  AtomicAmax amax;
};

inline void use_scale(CastState* s, const GemmCast& to, float scale) {
  *to.scale = scale;
  s->divide = !is_power_of_two(scale);
  s->factor = s->divide ? scale : 1.0f / scale;
}

template <class Body>
void for_strips(int64_t rows, int64_t cols, Body& body) {
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip)
      body(Strip{strip * kTile, std::min(kTile, rows - strip * kTile)});
  };
  parallel_for((rows + kTile - 1) / kTile, kGrain / std::max<int64_t>(kTile * cols, 1), run);
}

// A pass over the values of a strip, which collects the amax (see), encodes, or both.
struct Sink {
  const GemmCast* outputs;
  const CastState* state;
  int count;
  int64_t rows, cols;  // of the matrix
  bool see, encode;
  uint32_t amax_bits[kMaxOutputs] = {};

  // n <= kBlock values of one row, from column `col` on.
  void put(int k, int64_t row, int64_t col, int64_t n, const float* values) {
    const TensorView& q = outputs[k].q;
    uint8_t* codes = q.as<uint8_t>() + row * q.cols + col;
    const float factor = state[k].factor;
    const bool divide = state[k].divide;
    uint32_t bits = 0;
    if (see && encode)
      bits = simd().cast_seen(codes, q.dtype, values, DType::f32, n, factor, divide);
    else if (see)
      bits = simd().amax(values, DType::f32, n);
    else
      simd().cast(codes, q.dtype, values, DType::f32, n, factor, divide);
    amax_bits[k] = std::max(amax_bits[k], bits);
  }

  // Called when all rows of the strip have n values from column `col` on: writes padding and qt.
  void finish(const Strip& s, int64_t col, int64_t n) const {
    if (!encode) return;
    for (int k = 0; k < count; ++k) {
      const int64_t width = outputs[k].q.cols, height = outputs[k].qt.cols;
      const int64_t padded_cols = col + n == cols ? width - col : n;
      const int64_t padded_rows = s.row + s.rows == rows ? height - s.row : s.rows;
      uint8_t* q = outputs[k].q.as<uint8_t>() + s.row * width + col;
      for (int64_t r = 0; r < padded_rows; ++r) {
        const int64_t kept = r < s.rows ? n : 0;
        if (kept < padded_cols)
          std::memset(q + r * width + kept, 0, static_cast<size_t>(padded_cols - kept));
      }
      uint8_t* qt = outputs[k].qt.as<uint8_t>() + col * height + s.row;
      simd().transpose(qt, height, q, width, padded_rows, padded_cols, streams(width * height));
    }
  }
};

// produce(strip, first, sink) computes the values of a strip and gives all of them to sink.put, in
// any order, and their columns to sink.finish. It is called for every strip once or, where some
// scale is chosen just in time or was forecast badly, twice: `first` is true in the first pass.
template <class Produce>
void cast_both(const GemmCast* outputs, int count, int64_t rows, int64_t cols, Produce produce) {
  CastState state[kMaxOutputs];
  bool measure = false;  // the first pass only looks
  for (int k = 0; k < count; ++k) {
    const GemmCast& to = outputs[k];
    float scale = to.source.given ? *to.scale : 0.0f;
    if (to.source.history != nullptr)
      scale = delayed_scale(to.source.history, scale_max(to.q.dtype), to.power_of_two);
    measure = measure || !(to.source.given || scale != 0.0f);
    use_scale(&state[k], to, scale);
  }
  auto pass = [&](bool first, bool encode) {
    auto body = [&](const Strip& s) {
      Sink sink = {outputs, state, count, rows, cols, first, encode};
      produce(s, first, sink);
      for (int k = 0; k < count; ++k) state[k].amax.add(sink.amax_bits[k]);
    };
    for_strips(rows, cols, body);
  };
  pass(true, !measure);
  bool again = measure;
  for (int k = 0; k < count; ++k) {
    const GemmCast& to = outputs[k];
    const float amax = bit_cast<float>(state[k].amax.bits()), finite_max = scale_max(to.q.dtype);
    *to.amax = amax;
    if (!to.source.given && is_stale(*to.scale, amax, finite_max)) {
      use_scale(&state[k], to, scale_from_amax(amax, finite_max, to.power_of_two));
      again = true;
    }
    if (to.source.spread_nan && !to.source.given) *to.scale = nan_unless_finite(*to.scale, amax);
    if (to.source.history != nullptr) record_amax(to.source.history, amax);
  }
  if (again) pass(false, true);
}

}  // namespace quaver::cpu
