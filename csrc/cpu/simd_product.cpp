// Products of FP8 operands that are decoded as they are packed: codes become f32, which FMA
// multiplies, or pairs of bf16 where a processor multiplies and adds those in one instruction
// (AVX-512 BF16). FP8 is exact in both, and sums are f32. A tile of sums stays in registers for all
// of K.
//
// Compiled once per instruction set as simd.cpp is, and once more for AVX-512 BF16.
#include "simd_product.h"

#include <algorithm>

#include "span.h"

#if defined(__AVX2__)
namespace quaver::cpu::QUAVER_ISA {
namespace {

constexpr int kRows = 6;
#if defined(__AVX512F__)
constexpr int kVectors = 4;  // of columns: 24 registers of 32 hold sums
#else
constexpr int kVectors = 2;  // 12 registers of 16
#endif
constexpr int64_t kCols = kVectors * kRegister;
static_assert(kRows * kCols <= kMostSums, "a tile fits into what gemm.cpp has for it");
constexpr int64_t kAhead = 32;       // words of K that are fetched ahead of their use
constexpr int64_t kPackAhead = 256;  // and codes of a row

#if defined(__AVX512BF16__)
constexpr int64_t kDepth = 2;  // values in a word
#else
constexpr int64_t kDepth = 1;
#endif
// Codes are decoded so many at a time, to two registers of words.
constexpr int64_t kStep = 2 * kRegister, kCodes = kStep * kDepth;

struct Step {
  Integers of[2];
};

QUAVER_INLINE Register multiply_add(Integers a, Integers b, Register sum) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  return QUAVER_PS(fmadd)(floats_of(a), floats_of(b), sum);
#endif
}

#if defined(__AVX512BF16__)
// The bytes of each magnitude as bf16: 128 codes are as many as an instruction looks up.
template <class T>
struct Bf16Bytes {
  alignas(64) uint8_t low[128], high[128];

  constexpr Bf16Bytes() : low(), high() {
    using F = Format<T>;
    constexpr uint32_t steps = 1u << F::mantissa;
    for (uint32_t code = 0; code < 128; ++code) {
      uint32_t exponent = (code >> F::mantissa) + 127 - F::bias, mantissa = code % steps;
      if (code < steps) {  // a subnormal number, or zero
        exponent = mantissa == 0 ? 0 : exponent + 1;
        for (; mantissa != 0 && mantissa < steps; --exponent) mantissa *= 2;
        mantissa %= steps;
      }
      uint32_t bits = exponent << 7 | mantissa << (7 - F::mantissa);
      if (code > F::max_code) bits = code == F::infinity_code ? 0x7f80 : 0x7fff;
      low[code] = static_cast<uint8_t>(bits);
      high[code] = static_cast<uint8_t>(bits >> 8);
    }
  }
};

template <class T>
QUAVER_INLINE Step decoded(const uint8_t* codes) {
  static constexpr Bf16Bytes<T> table;
  auto look_up = [](const uint8_t* t, __m512i code) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(t), code, _mm512_load_si512(t + 64));
  };
  const __m512i code = _mm512_loadu_si512(codes);
  const __m512i low = look_up(table.low, code), magnitude = look_up(table.high, code);
  const __m512i high =
      _mm512_ternarylogic_epi32(magnitude, code, _mm512_set1_epi8(-0x80), 0xf8);  // with the sign
  // Words of 8 codes each, of which a quarter is in each lane of 128 bits.
  const __m512i even = _mm512_unpacklo_epi8(low, high), odd = _mm512_unpackhi_epi8(low, high);
  return {{_mm512_permutex2var_epi64(even, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), odd),
           _mm512_permutex2var_epi64(even, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), odd)}};
}
#else
template <class T>
QUAVER_INLINE Step decoded(const uint8_t* codes) {
  Register v[2];
  halves_to_floats(v, halves_of(T{}, widen(codes)), kHalvesFactor<T>);
  return {{bits_of(v[0]), bits_of(v[1])}};
}
#endif

// The step of a row at k, where the row may end.
template <class T>
QUAVER_INLINE Step decoded(const uint8_t* row, int64_t k, int64_t end) {
  if (__builtin_expect(k + kCodes <= end, 1)) return decoded<T>(row + k);
  alignas(64) uint8_t rest[kCodes] = {};
  memcpy(rest, row + k, static_cast<size_t>(end - k));
  return decoded<T>(rest);
}

QUAVER_INLINE void store_words(uint32_t* out, Integers x) {
  QUAVER_BITS(storeu)(reinterpret_cast<Integers*>(out), x);
}
QUAVER_INLINE Integers load_words_at(const uint32_t* x) {
  return QUAVER_BITS(loadu)(reinterpret_cast<const Integers*>(x));
}

template <class T>
void decode_rows_of(uint32_t* out, int64_t pitch, const CodeRows& a) {
  for (int64_t r = 0; r < a.rows; ++r) {
    const uint8_t* row = a.first + r * a.stride;
    uint32_t* to = out + r * pitch;
    for (int64_t k = 0; k < a.k; k += kCodes, to += kStep) {
      const Step step = decoded<T>(row, k, a.k);
      for (int i = 0; i < 2; ++i) store_words(to + i * kRegister, step.of[i]);
    }
  }
}

void decode_rows(uint32_t* out, int64_t pitch, const CodeRows& a) {
  (a.type == DType::e4m3 ? decode_rows_of<e4m3> : decode_rows_of<e5m2>)(out, pitch, a);
}

// Transposes a square of words, a register each row.
QUAVER_INLINE void transpose_words(Integers r[kRegister]) {
  Integers t[kRegister];
  for (int i = 0; i < kRegister; i += 2) {
    t[i] = QUAVER_INT(unpacklo_epi32)(r[i], r[i + 1]);
    t[i + 1] = QUAVER_INT(unpackhi_epi32)(r[i], r[i + 1]);
  }
  for (int i = 0; i < kRegister; i += 4) {
    for (int k = 0; k < 2; ++k) {
      r[i + 2 * k] = QUAVER_INT(unpacklo_epi64)(t[i + k], t[i + k + 2]);
      r[i + 2 * k + 1] = QUAVER_INT(unpackhi_epi64)(t[i + k], t[i + k + 2]);
    }
  }
  // Lanes of 128 bits are in order within themselves; now they are transposed.
#if defined(__AVX512F__)
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
#else
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < kRegister; ++i) r[i] = t[i];
#endif
}

// A register of columns from `first` on, in which the steps at k lie `kCols` words apart.
template <class T>
QUAVER_INLINE void pack_step(uint32_t* out, const CodeRows& b, int64_t first, int64_t k) {
  Integers square[2][kRegister];
  for (int64_t c = 0; c < kRegister; ++c) {
    Step step = {};
    if (first + c < b.rows) {
      const uint8_t* row = b.first + (first + c) * b.stride;
      __builtin_prefetch(row + k + kPackAhead);
      step = decoded<T>(row, k, b.k);
    }
    for (int i = 0; i < 2; ++i) square[i][c] = step.of[i];
  }
  for (int i = 0; i < 2; ++i) {
    transpose_words(square[i]);
    for (int64_t w = 0; w < kRegister; ++w)
      store_words(out + (i * kRegister + w) * kCols, square[i][w]);
  }
}

template <class T>
void pack_columns_of(uint32_t* out, const CodeRows& b) {
  for (int64_t first = 0; first < kCols; first += kRegister)
    for (int64_t k = 0; k < b.k; k += kCodes)
      pack_step<T>(out + k / kCodes * kStep * kCols + first, b, first, k);
}

void pack_columns(uint32_t* out, const CodeRows& b) {
  (b.type == DType::e4m3 ? pack_columns_of<e4m3> : pack_columns_of<e5m2>)(out, b);
}

template <int kCount>
struct Sums {
  Register of[kCount][kVectors];
};

// Adds the products of words begin <= w < end, and fetches as many of b from `ahead` on.
template <int kCount>
QUAVER_INLINE void multiply_words(Sums<kCount>* sums, const uint32_t* __restrict a, int64_t pitch,
                                  const uint32_t* __restrict b, int64_t begin, int64_t end,
                                  const uint32_t* ahead) {
#pragma GCC unroll 4
  for (int64_t w = begin; w < end; ++w, ahead += kCols) {
    Integers column[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      __builtin_prefetch(ahead + v * kRegister);
      column[v] = load_words_at(b + w * kCols + v * kRegister);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      const Integers value = all(static_cast<int32_t>(a[r * pitch + w]));
      for (int v = 0; v < kVectors; ++v)
        sums->of[r][v] = multiply_add(value, column[v], sums->of[r][v]);
    }
  }
}

template <int kCount>
void multiply_rows(float* __restrict to, const uint32_t* a, int64_t pitch, const uint32_t* b,
                   int64_t words, const uint32_t* next) {
  Sums<kCount> sums;
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums.of[r][v] = all(0.0f);
  const int64_t middle = std::max<int64_t>(0, words - kAhead);
  multiply_words<kCount>(&sums, a, pitch, b, 0, middle, b + kAhead * kCols);
  multiply_words<kCount>(&sums, a, pitch, b, middle, words, next);
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      QUAVER_PS(storeu)(to + r * kCols + v * kRegister, sums.of[r][v]);
}

void multiply(float* sums, const uint32_t* a, int64_t pitch, const uint32_t* b, int64_t rows,
              int64_t words, const uint32_t* next) {
  static_assert(kRows == 6, "a case for each number of rows");
  switch (rows) {
    case 1: return multiply_rows<1>(sums, a, pitch, b, words, next);
    case 2: return multiply_rows<2>(sums, a, pitch, b, words, next);
    case 3: return multiply_rows<3>(sums, a, pitch, b, words, next);
    case 4: return multiply_rows<4>(sums, a, pitch, b, words, next);
    case 5: return multiply_rows<5>(sums, a, pitch, b, words, next);
    default: return multiply_rows<6>(sums, a, pitch, b, words, next);
  }
}

QUAVER_INLINE void store_register(float* out, Register x) { QUAVER_PS(storeu)(out, x); }

QUAVER_INLINE void store_register(bf16* out, Register x) {
  const Integers bits = bits_of(x);
  const Integers odd = both(QUAVER_INT(srli_epi32)(bits, 16), all(1));
  const Integers rounded = QUAVER_INT(srli_epi32)(
      QUAVER_INT(add_epi32)(QUAVER_INT(add_epi32)(bits, all(0x7fff)), odd), 16);
#if defined(__AVX512F__)
  const Integers code =
      _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), all(0x7fff));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(code));
#else
  const Integers code =
      _mm256_blendv_epi8(rounded, all(0x7fff), bits_of(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  const __m256i packed = _mm256_permute4x64_epi64(words(code, code), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
#endif
}

QUAVER_INLINE Register load_register(const float* x) { return QUAVER_PS(loadu)(x); }
QUAVER_INLINE Register load_register(const bf16* x) {
#if defined(__AVX512F__)
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
#else
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
#endif
  return floats_of(QUAVER_INT(slli_epi32)(QUAVER_INT(cvtepu16_epi32)(codes), 16));
}

// The scales are multiplied first: each may be near a limit of f32 where their product is not.
QUAVER_INLINE Register scaled_sums(const float* sums, float row, const float* columns) {
  return QUAVER_PS(mul)(load_register(sums), QUAVER_PS(mul)(all(row), load_register(columns)));
}

void add(float* total, const float* sums, const TileScales& scales, int64_t rows, bool first) {
  for (int64_t r = 0; r < rows; ++r, sums += kCols, total += kCols) {
    for (int64_t c = 0; c < kCols; c += kRegister) {
      const Register y = scaled_sums(sums + c, scales.rows[r], scales.cols + c);
      store_register(total + c, first ? y : QUAVER_PS(add)(load_register(total + c), y));
    }
  }
}

// Whole rows of a tile.
template <class T>
void finish_rows(const ProductTile& t, const float* sums) {
  for (int64_t r = 0; r < t.rows; ++r, sums += kCols) {
    T* out = static_cast<T*>(t.out) + r * t.stride;
    for (int64_t c = 0; c < kCols; c += kRegister) {
      Register y = scaled_sums(sums + c, t.scales.rows[r], t.scales.cols + c);
      if (t.total != nullptr) y = QUAVER_PS(add)(load_register(t.total + r * kCols + c), y);
      if (t.bias != nullptr) y = QUAVER_PS(add)(y, load_register(t.bias + c));
      if (t.accumulate) y = QUAVER_PS(add)(y, load_register(out + c));
      store_register(out + c, y);
    }
  }
}

// The same of fewer columns.
template <class T>
void finish_values(const ProductTile& t, const float* sums) {
  for (int64_t r = 0; r < t.rows; ++r, sums += kCols) {
    T* out = static_cast<T*>(t.out) + r * t.stride;
    for (int64_t c = 0; c < t.cols; ++c) {
      float y = sums[c] * (t.scales.rows[r] * t.scales.cols[c]);
      if (t.total != nullptr) y = t.total[r * kCols + c] + y;
      if (t.bias != nullptr) y += t.bias[c];
      if (t.accumulate) y += decode(out[c]);
      out[c] = encode_nearest<T>(y);
    }
  }
}

template <class T>
void finish_as(const ProductTile& t, const float* sums) {
  (t.cols == kCols ? finish_rows<T> : finish_values<T>)(t, sums);
}

void finish(const ProductTile& t, const float* sums) {
  (t.type == DType::f32 ? finish_as<float> : finish_as<bf16>)(t, sums);
}

}  // namespace

extern const ProductSimd product_table;
const ProductSimd product_table = {kRows,        kCols,    kDepth, kStep, decode_rows,
                                   pack_columns, multiply, add,    finish};

}  // namespace quaver::cpu::QUAVER_ISA
#endif  // __AVX2__
