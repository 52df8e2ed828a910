// Casts whose scales differ from column to column. Compiled once per instruction set as simd.cpp
// is.
#include "simd_cast.h"

#include "span.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

// Magnitudes' bits order like the magnitudes in each format, so the maximum needs no decoding.
template <class Bits, class T>
void column_maxima(uint32_t* __restrict bits, const T* first, const TilePart& x) {
  constexpr Bits mask = static_cast<Bits>(~Bits(0)) >> 1;
  alignas(64) Bits most[kScaleTile] = {};
  for (int64_t r = 0; r < x.rows; ++r) {
    const T* __restrict row = first + r * x.stride;
    QUAVER_SIMD
    for (int64_t c = 0; c < x.cols; ++c) {
      const Bits code = bit_cast<Bits>(row[c]) & mask;
      most[c] = most[c] < code ? code : most[c];
    }
  }
  for (int64_t c = 0; c < x.cols; ++c) bits[c] = bit_cast<uint32_t>(decode(bit_cast<T>(most[c])));
}

void column_amaxes(uint32_t* bits, const TilePart& x) {
  if (x.type == DType::f32)
    column_maxima<uint32_t>(bits, static_cast<const float*>(x.first), x);
  else if (x.type == DType::f16)
    column_maxima<uint16_t>(bits, static_cast<const f16*>(x.first), x);
  else
    column_maxima<uint16_t>(bits, static_cast<const bf16*>(x.first), x);
}

template <class T>
void divide_columns(T* __restrict out, const float* __restrict x, const float* __restrict scale,
                    int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(out + i),
        encode16<T>(_mm512_div_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(scale + i))));
#elif defined(__AVX2__)
  auto quotient = [&](int64_t k) {
    return _mm256_div_ps(_mm256_loadu_ps(x + k), _mm256_loadu_ps(scale + k));
  };
  for (; i + 16 <= n; i += 16)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     encode16<T>(quotient(i), quotient(i + 8)));
#endif
  for (; i < n; ++i) out[i] = encode_nearest<T>(x[i] / scale[i]);
}

void cast_columns(uint8_t* out, DType out_type, const TilePart& x, const float* scale) {
  alignas(64) float buffer[kScaleTile];
  for (int64_t r = 0; r < x.rows; ++r) {
    const char* row = at(x.first, x.type, r * x.stride);
    const float* values = reinterpret_cast<const float*>(row);
    if (x.type != DType::f32) {
      load_any(buffer, row, x.type, x.cols, 1.0f);
      values = buffer;
    }
    uint8_t* codes = out + r * kScaleTile;
    if (out_type == DType::e4m3)
      divide_columns(reinterpret_cast<e4m3*>(codes), values, scale, x.cols);
    else
      divide_columns(reinterpret_cast<e5m2*>(codes), values, scale, x.cols);
  }
}

}  // namespace

extern const CastSimd cast_table;
const CastSimd cast_table = {column_amaxes, cast_columns};

}  // namespace quaver::cpu::QUAVER_ISA
