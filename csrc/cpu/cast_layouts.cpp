#include "quaver/cast_layouts.h"

#include <algorithm>
#include <cstring>

#include "../check_cast_layouts.h"
#include "simd.h"
#include "squares.h"

namespace quaver::cpu {
namespace {

// One for each row and column of a square: amaxes, as bits, and the scales that encode.
struct Amaxes {
  alignas(64) uint32_t row[kScaleTile], col[kScaleTile];
};
struct Scales {
  alignas(64) float row[kScaleTile], col[kScaleTile];
};

void measure(const LayoutsCast& to, const Square& s, Amaxes* amax) {
  cast_simd().measure(amax->row, amax->col, s.x);
  if (to.layout_t().grain != Grain::tile) return;
  const uint32_t most = *std::max_element(amax->row, amax->row + s.x.rows);
  if (to.grain == Grain::tile) std::fill_n(amax->row, s.x.rows, most);
  std::fill_n(amax->col, s.x.cols, most);
}

// Maxima are exact, so the order of the threads does not matter.
void raise(float* place, uint32_t bits) {
  auto* p = reinterpret_cast<uint32_t*>(place);
  uint32_t seen = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (seen < bits &&
         !__atomic_compare_exchange_n(p, &seen, bits, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// The scale that encodes values of this amax; the written one is NaN where they are not finite.
float choose(const LayoutsCast& to, DType type, float amax, float* written) {
  const float scale = scale_from_amax(amax, scale_max(type), to.power_of_two);
  *written = nan_unless_finite(scale, amax);
  return scale;
}

// Chooses the scales of a square's rows in one layout, whose first row is `row` and first column
// `col`, and writes them.
void choose_scales(const LayoutsCast& to, const Operand& o, const Layout& layout, int64_t row,
                   int64_t col, const uint32_t* amax, int64_t n, float* scale) {
  if (!o.wanted()) return;
  const int64_t per_row = layout.scales_in_row(o.codes.cols);
  for (int64_t r = 0; r < n; ++r) {
    const int64_t place = (row + r) / layout.height() * per_row + col / kScaleTile;
    scale[r] = choose(to, o.codes.dtype, bit_cast<float>(amax[r]), o.scale.as<float>() + place);
  }
}

void encode_rows(const Operand& q, const Square& s, const float* scale) {
  uint8_t* out = q.codes.as<uint8_t>() + s.row * q.codes.cols + s.col;
  cast_simd().cast_rows(out, q.codes.dtype, q.codes.cols, s.x, scale);
}

// codes: those of the square, `stride` a row.
void write_transposed(const Operand& qt, const Square& s, const uint8_t* codes, int64_t stride) {
  const int64_t height = qt.codes.cols;
  uint8_t* out = qt.codes.as<uint8_t>() + s.col * height + s.row;
  simd().transpose(out, height, codes, stride, s.x.rows, s.x.cols, streams(qt.codes.numel()));
}

void encode_columns(const Operand& qt, const Square& s, const float* scale) {
  alignas(64) uint8_t codes[kScaleTile * kScaleTile];
  cast_simd().cast_columns(codes, qt.codes.dtype, kScaleTile, s.x, scale);
  write_transposed(qt, s, codes, kScaleTile);
}

void encode(const LayoutsCast& to, const Square& s, const Scales& scale) {
  const Operand &q = to.q, &qt = to.qt;
  if (q.wanted()) encode_rows(q, s, scale.row);
  if (!qt.wanted()) return;
  if (!q.wanted() || to.grain != Grain::tile) return encode_columns(qt, s, scale.col);
  write_transposed(qt, s, q.codes.as<const uint8_t>() + s.row * q.codes.cols + s.col, q.codes.cols);
}

// A row lies in several squares: its amax first, gathered where its scale will be.
void cast_by_rows(const LayoutsCast& to, const TensorView& x) {
  for_squares(x, [&](const Square& s) {
    Amaxes amax;
    measure(to, s, &amax);
    for (int64_t r = 0; to.q.wanted() && r < s.x.rows; ++r)
      raise(to.q.scale.as<float>() + s.row + r, amax.row[r]);
    for (int64_t c = 0; to.qt.wanted() && c < s.x.cols; ++c)
      raise(to.qt.scale.as<float>() + s.col + c, amax.col[c]);
  });
  for_squares(x, [&](const Square& s) {
    Scales scale;
    float unused;
    for (int64_t r = 0; to.q.wanted() && r < s.x.rows; ++r)
      scale.row[r] = choose(to, to.q.codes.dtype, to.q.scale.as<const float>()[s.row + r], &unused);
    for (int64_t c = 0; to.qt.wanted() && c < s.x.cols; ++c)
      scale.col[c] =
          choose(to, to.qt.codes.dtype, to.qt.scale.as<const float>()[s.col + c], &unused);
    encode(to, s, scale);
  });
  for (const Operand* o : {&to.q, &to.qt})
    for (int64_t r = 0; o->wanted() && r < o->scale.numel(); ++r) {
      float* scale = o->scale.as<float>() + r;
      choose(to, o->codes.dtype, *scale, scale);
    }
}

// Zero codes beyond rows x cols. Scales that no value chooses are those of zeros.
void clear_padding(const LayoutsCast& to, const Operand& o, int64_t rows, int64_t cols) {
  if (!o.wanted()) return;
  std::fill_n(o.scale.as<float>(), o.scale.numel(), to.grain == Grain::row ? 0.0f : 1.0f);
  const int64_t width = o.codes.cols;
  auto* codes = o.codes.as<uint8_t>();
  for (int64_t r = 0; width > cols && r < rows; ++r)
    std::memset(codes + r * width + cols, 0, static_cast<size_t>(width - cols));
  std::memset(codes + rows * width, 0, static_cast<size_t>((o.codes.rows - rows) * width));
}

}  // namespace

void cast_square(const LayoutsCast& to, const Square& s) {
  Amaxes amax;
  Scales scale;
  measure(to, s, &amax);
  choose_scales(to, to.q, to.layout(), s.row, s.col, amax.row, s.x.rows, scale.row);
  choose_scales(to, to.qt, to.layout_t(), s.col, s.row, amax.col, s.x.cols, scale.col);
  encode(to, s, scale);
}

void clear_layouts(const LayoutsCast& to, int64_t rows, int64_t cols) {
  clear_padding(to, to.q, rows, cols);
  clear_padding(to, to.qt, cols, rows);
}

void cast_layouts(const LayoutsCast& to, const TensorView& x) {
  check_cast_layouts(to, x);
  clear_layouts(to, x.rows, x.cols);
  if (to.grain == Grain::row) return cast_by_rows(to, x);
  for_squares(x, [&](const Square& s) { cast_square(to, s); });
}

}  // namespace quaver::cpu
