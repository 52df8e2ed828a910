// Casts of tiles by scales of their rows or columns. Compiled once per instruction set as simd.cpp
// is.
#include "simd_cast.h"

#include "words.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

// Magnitudes' bits order like the magnitudes in each format, so a maximum needs no decoding.
template <class Bits, class T>
void maxima(uint32_t* __restrict row_bits, uint32_t* __restrict col_bits, const T* first,
            const TilePart& x) {
  constexpr Bits mask = static_cast<Bits>(~Bits(0)) >> 1;
  alignas(64) Bits most[kScaleTile] = {};
  for (int64_t r = 0; r < x.rows; ++r) {
    const T* __restrict row = first + r * x.stride;
    for (int64_t i = 0; i < kScaleTile; i += 64 / int64_t(sizeof(T)))
      __builtin_prefetch(row + kScaleTile + i);  // of the next tile: rows lie too far apart
    Bits widest = 0;
    _Pragma("omp simd reduction(max : widest)") for (int64_t c = 0; c < x.cols; ++c) {
      const Bits code = bit_cast<Bits>(row[c]) & mask;
      most[c] = most[c] < code ? code : most[c];
      widest = widest < code ? code : widest;
    }
    row_bits[r] = bit_cast<uint32_t>(decode(bit_cast<T>(widest)));
  }
  for (int64_t c = 0; c < x.cols; ++c)
    col_bits[c] = bit_cast<uint32_t>(decode(bit_cast<T>(most[c])));
}

void measure(uint32_t* row_bits, uint32_t* col_bits, const TilePart& x) {
  if (x.type == DType::f32)
    maxima<uint32_t>(row_bits, col_bits, static_cast<const float*>(x.first), x);
  else if (x.type == DType::f16)
    maxima<uint16_t>(row_bits, col_bits, static_cast<const f16*>(x.first), x);
  else
    maxima<uint16_t>(row_bits, col_bits, static_cast<const bf16*>(x.first), x);
}

// body(codes, row, r) of each row, where it lies.
template <class Body>
void for_rows(uint8_t* out, int64_t stride, const TilePart& x, Body body) {
  for (int64_t r = 0; r < x.rows; ++r) body(out + r * stride, at(x.first, x.type, r * x.stride), r);
}

// The row as f32, where it lies or in the buffer.
const float* row_values(float* buffer, const char* row, const TilePart& x) {
  if (x.type == DType::f32) return reinterpret_cast<const float*>(row);
  load_any(buffer, row, x.type, x.cols, 1.0f);
  return buffer;
}

template <class T>
void rows_to(uint8_t* out, int64_t stride, const TilePart& x, const float* scale) {
  alignas(64) float buffer[kScaleTile];
  for_rows(out, stride, x, [&](uint8_t* codes, const char* row, int64_t r) {
    T* to = reinterpret_cast<T*>(codes);
    const bool exact = is_power_of_two(scale[r]);
#if defined(__AVX2__)
    if (exact && x.type == DType::bf16) {
      cast_words<false>(to, reinterpret_cast<const bf16*>(row), x.cols, 1.0f / scale[r], false);
      return;
    }
#endif
    const float* values = row_values(buffer, row, x);
    if (exact)
      store(to, values, x.cols, 1.0f / scale[r]);
    else
      store_divided(to, values, x.cols, scale[r]);
  });
}

void cast_rows(uint8_t* out, DType out_type, int64_t stride, const TilePart& x,
               const float* scale) {
  (out_type == DType::e4m3 ? rows_to<e4m3> : rows_to<e5m2>)(out, stride, x, scale);
}

#if defined(__AVX2__)
// What the scales of columns mean to registers and to words.
struct Columns {
  alignas(64) float factor[kScaleTile];  // reciprocals, where all are exact
  alignas(64) uint16_t least[kScaleTile], base[kScaleTile];
  bool exact = true, words = true;
};

template <class T>
void look_at_columns(Columns* to, const float* scale, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    WordScale words = {0, 0};
    to->exact = to->exact && is_power_of_two(scale[c]);
    to->factor[c] = 1.0f / scale[c];
    to->words = to->words && word_scale<T>(&words, to->factor[c]);
    to->least[c] = words.least;
    to->base[c] = words.base;
  }
}

template <class T>
QUAVER_INLINE bool encode_column_words(T* out, const bf16* x, const Columns& by, int64_t c) {
  const Words w = load_words(reinterpret_cast<const uint16_t*>(x + c));
  const Words magnitude = word_magnitudes(w);
  if (__builtin_expect(!have_codes(magnitude, load_words(by.least + c)), 0)) return false;
  store_codes(out + c, word_codes<T>(w, magnitude, load_words(by.base + c)));
  return true;
}

// kValues values from column c on, under scales that are exact or not.
template <bool kExact, class T, class In>
QUAVER_INLINE void encode_columns(T* out, const In* x, const Columns& by, const float* scale,
                                  int64_t c) {
  Values v = load_values(x + c);
  const Values s = load_values((kExact ? by.factor : scale) + c);
  for (int k = 0; k < kRegisters; ++k)
    v.of[k] = kExact ? QUAVER_PS(mul)(v.of[k], s.of[k]) : QUAVER_PS(div)(v.of[k], s.of[k]);
  encode_values(out + c, v);
}

template <bool kExact, class T>
void whole_registers(uint8_t* out, int64_t stride, const TilePart& x, const float* scale,
                     const Columns& by) {
  alignas(64) float buffer[kScaleTile];
  const bool words = kExact && by.words && x.type == DType::bf16;
  for_rows(out, stride, x, [&](uint8_t* codes, const char* row, int64_t) {
    T* to = reinterpret_cast<T*>(codes);
    const float* values = words ? nullptr : row_values(buffer, row, x);
    for (int64_t c = 0; c + kValues <= x.cols; c += kValues) {
      const bf16* from = reinterpret_cast<const bf16*>(row);
      if (!words)
        encode_columns<kExact>(to, values, by, scale, c);
      else if (!encode_column_words(to, from, by, c))
        encode_columns<kExact>(to, from, by, scale, c);
    }
  });
}
#endif

template <class T>
void columns_to(uint8_t* out, int64_t stride, const TilePart& x, const float* scale) {
  int64_t first = 0;  // the first column that is left
#if defined(__AVX2__)
  Columns by;
  look_at_columns<T>(&by, scale, x.cols);
  (by.exact ? whole_registers<true, T> : whole_registers<false, T>)(out, stride, x, scale, by);
  first = x.cols - x.cols % kValues;
#endif
  if (first == x.cols) return;
  alignas(64) float buffer[kScaleTile];
  for_rows(out, stride, x, [&](uint8_t* codes, const char* row, int64_t) {
    const float* values = row_values(buffer, row, x);
    for (int64_t c = first; c < x.cols; ++c)
      reinterpret_cast<T*>(codes)[c] = encode_nearest<T>(values[c] / scale[c]);
  });
}

void cast_columns(uint8_t* out, DType out_type, int64_t stride, const TilePart& x,
                  const float* scale) {
  (out_type == DType::e4m3 ? columns_to<e4m3> : columns_to<e5m2>)(out, stride, x, scale);
}

}  // namespace

extern const CastSimd cast_table;
const CastSimd cast_table = {measure, cast_rows, cast_columns};

}  // namespace quaver::cpu::QUAVER_ISA
