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

// Rows of one strip and at most kBlock columns.
struct Block {
  int64_t row, rows, col, cols;
};

constexpr int kMaxOutputs = 2;

struct CastState {
  bool measure = false;  // the scale is chosen just in time
  float factor = 1.0f;   // of the encoding: the reciprocal of the scale where that is exact
  bool divide = false;
  AtomicAmax amax;
};

inline void use_scale(CastState* s, const GemmCast& to, float scale) {
  *to.scale = scale;
  s->divide = !is_power_of_two(scale);
  s->factor = s->divide ? scale : 1.0f / scale;
}

// Calls body(block) for every block of a matrix, in order within a strip.
template <class Body>
void for_blocks(int64_t rows, int64_t cols, Body& body) {
  const int64_t strips = (rows + kTile - 1) / kTile;
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip)
      for (int64_t col = 0; col < cols; col += kBlock)
        body(Block{strip * kTile, std::min(kTile, rows - strip * kTile), col,
                   std::min(kBlock, cols - col)});
  };
  parallel_for(strips, kGrain / std::max<int64_t>(kTile * cols, 1), run);
}

// Zeros behind a block's values, and its transpose.
inline void finish_block(const GemmCast& to, const Block& b, int64_t rows, int64_t cols) {
  const int64_t width = to.q.cols, height = to.qt.cols;
  const int64_t padded_cols = b.col + b.cols == cols ? width - b.col : b.cols;
  const int64_t padded_rows = b.row + b.rows == rows ? height - b.row : b.rows;
  uint8_t* q = to.q.as<uint8_t>() + b.row * width + b.col;
  for (int64_t r = 0; r < padded_rows; ++r) {
    const int64_t kept = r < b.rows ? b.cols : 0;
    std::memset(q + r * width + kept, 0, static_cast<size_t>(padded_cols - kept));
  }
  uint8_t* qt = to.qt.as<uint8_t>() + b.col * height + b.row;
  for (int64_t c = 0; c < padded_cols; c += kTile)
    simd().transpose(qt + c * height, height, q + c, width, padded_rows,
                     std::min(kTile, padded_cols - c));
}

// produce(block, first, sink) computes the values of a block and calls sink(output, row, values)
// for each of its rows and outputs; it is called for every block, once or, where some scale is
// chosen just in time, twice: `first` says which.
template <class Produce>
void cast_both(const GemmCast* outputs, int count, int64_t rows, int64_t cols, Produce produce) {
  CastState state[kMaxOutputs];
  bool measure = false;
  for (int k = 0; k < count; ++k) {
    const GemmCast& to = outputs[k];
    float scale = to.source.given ? *to.scale : 0.0f;
    if (to.source.history != nullptr)
      scale = delayed_scale(to.source.history, scale_max(to.q.dtype), to.power_of_two);
    state[k].measure = !to.source.given && scale == 0.0f;
    if (!state[k].measure) use_scale(&state[k], to, scale);
    measure = measure || state[k].measure;
  }
  auto see = [&](uint32_t* bits, int k, const Block& b, const float* values) {
    bits[k] = std::max(bits[k], simd().amax(values, DType::f32, b.cols));
  };
  auto add = [&](const uint32_t* bits) {
    for (int k = 0; k < count; ++k) state[k].amax.add(bits[k]);
  };
  if (measure) {
    auto body = [&](const Block& b) {
      uint32_t bits[kMaxOutputs] = {};
      produce(b, true, [&](int k, int64_t, const float* values) { see(bits, k, b, values); });
      add(bits);
    };
    for_blocks(rows, cols, body);
    for (int k = 0; k < count; ++k) {
      const GemmCast& to = outputs[k];
      const float amax = bit_cast<float>(state[k].amax.bits());
      if (state[k].measure)
        use_scale(&state[k], to, scale_from_amax(amax, scale_max(to.q.dtype), to.power_of_two));
    }
  }
  auto body = [&](const Block& b) {
    uint32_t bits[kMaxOutputs] = {};
    produce(b, !measure, [&](int k, int64_t row, const float* values) {
      const GemmCast& to = outputs[k];
      if (!measure) see(bits, k, b, values);
      simd().cast(to.q.as<uint8_t>() + row * to.q.cols + b.col, to.q.dtype, values, DType::f32,
                  b.cols, state[k].factor, state[k].divide);
    });
    for (int k = 0; k < count; ++k) finish_block(outputs[k], b, rows, cols);
    add(bits);
  };
  for_blocks(rows, cols, body);
  for (int k = 0; k < count; ++k) {
    *outputs[k].amax = bit_cast<float>(state[k].amax.bits());
    if (outputs[k].source.history != nullptr)
      record_amax(outputs[k].source.history, *outputs[k].amax);
  }
}

}  // namespace quaver::cpu
