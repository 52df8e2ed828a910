// The vector loops, compiled once per instruction set (QUAVER_ISA = portable, avx2, avx512). They
// are plain C++ over the arithmetic of include/quaver, written so that the compiler vectorises
// them; span.h has the conversions that they share. Tests compare the bits of all instruction sets.
#include "simd.h"

#include <algorithm>
#include <type_traits>

#include "simd_adam.h"
#include "simd_philox.h"
#include "simd_subset.h"
#include "simd_sum.h"
#include "words.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

uint32_t amax(const void* x, DType type, int64_t n) { return amax_any(x, type, n); }

#if defined(__AVX2__)
// Casts f32 or bf16 to FP8; returns the bits of the amax of x where it is to see it.
template <bool kSee, bool kDivide, class T, class In>
uint32_t cast_fp8(T* __restrict out, const In* __restrict x, int64_t n, float factor) {
  Integers most = all(0);
  int64_t i = 0;
  for (; i + kValues <= n; i += kValues) {
    prefetch(x + i, kValues * int64_t(sizeof(In)));
    const Values v = load_values(x + i);
    for (int k = 0; kSee && k < kRegisters; ++k) most = larger_bits(most, magnitude_bits(v.of[k]));
    encode_values(out + i, in_format<kDivide>(v, factor));
  }
  uint32_t bits = largest_bits(most);
  if (i == n) return bits;
  alignas(64) float rest[kValues];
  load(rest, x + i, n - i, 1.0f);
  if (kSee) bits = std::max(bits, amax_code<uint32_t>(rest, n - i));
  store_fp8<T, kDivide>(out + i, rest, n - i, factor);
  return bits;
}

#if defined(__AVX512F__)
template <bool kSee, class T>
uint16_t cast_looked_up(T* out, const bf16* x, int64_t n, const WordTable<T>& table, float factor,
                        bool divide) {
  return cast_words_by<kSee>(out, x, n, table, true, [&](T* to, const bf16* from, int64_t count) {
    (divide ? cast_fp8<false, true, T, bf16> : cast_fp8<false, false, T, bf16>)(to, from, count,
                                                                                factor);
  });
}
#endif

template <bool kSee, class In>
uint32_t cast_fp8(void* out, DType out_type, const In* x, int64_t n, float factor, bool divide) {
  auto run = [&](auto* to) {
    if constexpr (std::is_same_v<In, bf16>) {
      if (!divide && is_power_of_two(factor))
        return bit_cast<uint32_t>(decode(bf16{cast_words<kSee>(to, x, n, factor, true)}));
#if defined(__AVX512F__)
      using T = std::remove_pointer_t<decltype(to)>;
      if (const auto* table = WordTable<T>::of(factor, divide, n))
        return bit_cast<uint32_t>(
            decode(bf16{cast_looked_up<kSee>(to, x, n, *table, factor, divide)}));
#endif
    }
    return divide ? cast_fp8<kSee, true>(to, x, n, factor)
                  : cast_fp8<kSee, false>(to, x, n, factor);
  };
  return out_type == DType::e4m3 ? run(static_cast<e4m3*>(out)) : run(static_cast<e5m2*>(out));
}
#endif

// Casts through a buffer, from any type to any.
void cast_buffered(void* out, DType out_type, const void* x, DType type, int64_t n, float factor,
                   bool divide) {
  alignas(64) float buffer[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    const float* values = reinterpret_cast<const float*>(at(x, type, i));
    if (type != DType::f32) {
      load_any(buffer, at(x, type, i), type, m, 1.0f);
      values = buffer;
    }
    if (divide)
      store_divided_any(at(out, out_type, i), out_type, values, m, factor);
    else
      store_any(at(out, out_type, i), out_type, values, m, factor);
  }
}

template <bool kSee>
uint32_t cast_as(void* out, DType out_type, const void* x, DType type, int64_t n, float factor,
                 bool divide) {
#if defined(__AVX2__)
  if (is_fp8(out_type) && type == DType::f32)
    return cast_fp8<kSee>(out, out_type, static_cast<const float*>(x), n, factor, divide);
  if (is_fp8(out_type) && type == DType::bf16)
    return cast_fp8<kSee>(out, out_type, static_cast<const bf16*>(x), n, factor, divide);
  if (is_fp8(type) && out_type == DType::bf16 && factor == 1.0f) {
    auto* to = static_cast<bf16*>(out);
    type == DType::e4m3 ? decode_words(to, static_cast<const e4m3*>(x), n)
                        : decode_words(to, static_cast<const e5m2*>(x), n);
    return kSee ? amax(x, type, n) : 0;
  }
#endif
  uint32_t bits = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    if (kSee) bits = std::max(bits, amax(at(x, type, i), type, m));
    cast_buffered(at(out, out_type, i), out_type, at(x, type, i), type, m, factor, divide);
  }
  return bits;
}

void cast(void* out, DType out_type, const void* x, DType type, int64_t n, float factor,
          bool divide) {
  cast_as<false>(out, out_type, x, type, n, factor, divide);
}

uint32_t cast_seen(void* out, DType out_type, const void* x, DType type, int64_t n, float factor,
                   bool divide) {
  return cast_as<true>(out, out_type, x, type, n, factor, divide);
}

void cast_stochastic(void* out, DType out_type, const void* x, DType type, int64_t n, float scale,
                     uint64_t seed, uint64_t first) {
  alignas(64) float buffer[kBlock];
  alignas(64) uint32_t random[kBlock + kDrawn];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    load_any(buffer, at(x, type, i), type, m, 1.0f);
    const uint64_t index = first + static_cast<uint64_t>(i);
    const int64_t inside = index % 4;  // its block
    random_words(random, seed, index - static_cast<uint64_t>(inside), 0, m + inside);
    auto run = [&](auto* p) {
      QUAVER_SIMD
      for (int64_t j = 0; j < m; ++j)
        p[j] = encode_stochastic<std::remove_reference_t<decltype(*p)>>(buffer[j] / scale,
                                                                        random[inside + j]);
    };
    if (out_type == DType::e4m3)
      run(reinterpret_cast<e4m3*>(at(out, out_type, i)));
    else if (out_type == DType::e5m2)
      run(reinterpret_cast<e5m2*>(at(out, out_type, i)));
    else
      run(reinterpret_cast<f16*>(at(out, out_type, i)));
  }
}

// A square of bytes, kSquare on a side, transposed in registers.
#if defined(__SSE2__)
constexpr int64_t kSquare = 16;

// Each round interleaves the rows of the two halves; four rounds turn rows into columns.
inline void transpose_square(uint8_t* out, int64_t out_stride, const uint8_t* x, int64_t stride) {
  __m128i r[16], t[16];
  for (int i = 0; i < 16; ++i)
    r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i * stride));
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm_unpacklo_epi8(r[i], r[i + 8]);
      t[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[i + 8]);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }
  for (int i = 0; i < 16; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * out_stride), r[i]);
}
#else
constexpr int64_t kSquare = 8;

// Three rounds of swaps of 1, 2 and 4 bytes between rows that are 1, 2 and 4 apart.
inline void transpose_square(uint8_t* out, int64_t out_stride, const uint8_t* x, int64_t stride) {
  uint64_t r[8];
  for (int i = 0; i < 8; ++i) memcpy(&r[i], x + i * stride, 8);
  auto swap = [&](int distance, int shift, uint64_t mask) {
    for (int i = 0; i < 8; ++i) {
      if (i & distance) continue;
      const uint64_t t = ((r[i] >> shift) ^ r[i + distance]) & mask;
      r[i] ^= t << shift;
      r[i + distance] ^= t;
    }
  };
  swap(1, 8, 0x00ff00ff00ff00ffull);
  swap(2, 16, 0x0000ffff0000ffffull);
  swap(4, 32, 0x00000000ffffffffull);
  for (int i = 0; i < 8; ++i) memcpy(out + i * out_stride, &r[i], 8);
}
#endif

// Rows whose codes fill a line of the cache, in a run of each column.
constexpr int64_t kLine = 64;

#if defined(__AVX512F__)
// As transpose_square, of kLine rows: the squares lie side by side in the registers.
inline void transpose_lines(uint8_t* out, int64_t out_stride, const uint8_t* x, int64_t stride,
                            bool stream) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) {
    auto row = [&](int square) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + (16 * square + i) * stride));
    };
    r[i] = _mm512_castsi128_si512(row(0));
    r[i] = _mm512_inserti32x4(r[i], row(1), 1);
    r[i] = _mm512_inserti32x4(r[i], row(2), 2);
    r[i] = _mm512_inserti32x4(r[i], row(3), 3);
  }
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_epi8(r[i], r[i + 8]);
      t[2 * i + 1] = _mm512_unpackhi_epi8(r[i], r[i + 8]);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }
  for (int i = 0; i < 16; ++i) {
    if (stream)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i * out_stride), r[i]);
    else
      _mm512_storeu_si512(out + i * out_stride, r[i]);
  }
}
#else
inline void transpose_lines(uint8_t* out, int64_t out_stride, const uint8_t* x, int64_t stride,
                            [[maybe_unused]] bool stream) {
  alignas(kLine) uint8_t lines[kSquare * kLine];
  for (int64_t row = 0; row < kLine; row += kSquare)
    transpose_square(lines + row, kLine, x + row * stride, stride);
  for (int64_t i = 0; i < kSquare; ++i) {
#if defined(__AVX2__)
    if (stream) {
      const auto* from = reinterpret_cast<const __m256i*>(lines + i * kLine);
      auto* to = reinterpret_cast<__m256i*>(out + i * out_stride);
      _mm256_stream_si256(to, _mm256_load_si256(from));
      _mm256_stream_si256(to + 1, _mm256_load_si256(from + 1));
      continue;
    }
#endif
    memcpy(out + i * out_stride, lines + i * kLine, kLine);
  }
}
#endif

void transpose(uint8_t* out, int64_t out_stride, const uint8_t* x, int64_t stride, int64_t rows,
               int64_t cols, bool stream) {
  const int64_t line_rows = rows - rows % kLine, square_rows = rows - rows % kSquare;
  const int64_t square_cols = cols - cols % kSquare;
  // Only whole lines pass by the cache.
  stream = stream && (reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(out_stride)) %
                             static_cast<uintptr_t>(kLine) ==
                         0;
  // The outer loop is over columns, so that a run of `out` rows is written from end to end.
  for (int64_t col = 0; col < square_cols; col += kSquare) {
    for (int64_t row = 0; row < line_rows; row += kLine)
      transpose_lines(out + col * out_stride + row, out_stride, x + row * stride + col, stride,
                      stream);
    for (int64_t row = line_rows; row < square_rows; row += kSquare)
      transpose_square(out + col * out_stride + row, out_stride, x + row * stride + col, stride);
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t col = row < square_rows ? square_cols : 0; col < cols; ++col)
      out[col * out_stride + row] = x[row * stride + col];
#if defined(__SSE2__)
  if (stream) _mm_sfence();  // other threads read it
#endif
}

}  // namespace

extern const Simd table;
const Simd table = {amax, cast,       cast_seen,     cast_stochastic, transpose,   sum_squares,
                    add,  sum_shards, encode_groups, decode_groups,   subset_sums, adam};

}  // namespace quaver::cpu::QUAVER_ISA
