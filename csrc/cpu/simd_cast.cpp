// Casts of tiles by scales of their rows or columns. Compiled once per instruction set as simd.cpp
// is.
#include "simd_cast.h"

#include "span.h"

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

template <class T>
void divide_columns(T* __restrict out, const float* __restrict x, const float* __restrict scale,
                    int64_t n) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + kValues <= n; i += kValues) {
    Values quotients = load_values(x + i);
    const Values scales = load_values(scale + i);
    for (int k = 0; k < kRegisters; ++k)
      quotients.of[k] = QUAVER_PS(div)(quotients.of[k], scales.of[k]);
    encode_values(out + i, quotients);
  }
#endif
  for (; i < n; ++i) out[i] = encode_nearest<T>(x[i] / scale[i]);
}

// encode(codes, values, r) for each row r.
template <class Encode>
void for_rows(uint8_t* out, int64_t stride, const TilePart& x, Encode encode) {
  alignas(64) float buffer[kScaleTile];
  for (int64_t r = 0; r < x.rows; ++r) {
    const char* row = at(x.first, x.type, r * x.stride);
    const float* values = reinterpret_cast<const float*>(row);
    if (x.type != DType::f32) {
      load_any(buffer, row, x.type, x.cols, 1.0f);
      values = buffer;
    }
    encode(out + r * stride, values, r);
  }
}

template <class T>
void rows_to(uint8_t* out, int64_t stride, const TilePart& x, const float* scale) {
  for_rows(out, stride, x, [&](uint8_t* codes, const float* values, int64_t r) {
    T* to = reinterpret_cast<T*>(codes);
    if (is_power_of_two(scale[r]))
      store(to, values, x.cols, 1.0f / scale[r]);
    else
      store_divided(to, values, x.cols, scale[r]);
  });
}

void cast_rows(uint8_t* out, DType out_type, int64_t stride, const TilePart& x,
               const float* scale) {
  (out_type == DType::e4m3 ? rows_to<e4m3> : rows_to<e5m2>)(out, stride, x, scale);
}

template <class T>
void columns_to(uint8_t* out, int64_t stride, const TilePart& x, const float* scale) {
  for_rows(out, stride, x, [&](uint8_t* codes, const float* values, int64_t) {
    divide_columns(reinterpret_cast<T*>(codes), values, scale, x.cols);
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
