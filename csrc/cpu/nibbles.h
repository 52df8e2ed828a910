// Bytes of two 4-bit codes, the even element's in the low bits.
//
// For simd*.cpp only, which are compiled once per instruction set.
#pragma once

#include "span.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

// Codes of n elements, one a byte. `codes` has room for an even number.
inline void unpack(uint8_t* __restrict codes, const uint8_t* __restrict packed, int64_t n) {
  const int64_t bytes = (n + 1) / 2;
  QUAVER_SIMD
  for (int64_t j = 0; j < bytes; ++j) {
    codes[2 * j] = packed[j] & 15;
    codes[2 * j + 1] = packed[j] >> 4;
  }
}

inline void pack(uint8_t* __restrict packed, const uint8_t* __restrict codes, int64_t n) {
  const int64_t bytes = (n + 1) / 2;
  QUAVER_SIMD
  for (int64_t j = 0; j < bytes; ++j)
    packed[j] = static_cast<uint8_t>(codes[2 * j] | codes[2 * j + 1] << 4);
}

// The levels of n codes; `level` has 16.
inline void look_up(float* __restrict out, const uint8_t* __restrict packed, int64_t n,
                    const float* level) {
#if defined(__AVX512F__)
  const __m512 table = _mm512_loadu_ps(level);
#elif defined(__AVX2__)
  const __m256 low_table = _mm256_loadu_ps(level), high_table = _mm256_loadu_ps(level + 8);
#endif
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + 16 <= n; i += 16) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i / 2));
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(bytes, mask),
                                            _mm_and_si128(_mm_srli_epi16(bytes, 4), mask));
#if defined(__AVX512F__)
    _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), table));
#else
    for (int half = 0; half < 2; ++half) {
      const __m256i code = _mm256_cvtepu8_epi32(half == 0 ? codes : _mm_srli_si128(codes, 8));
      const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
      _mm256_storeu_ps(out + i + 8 * half,
                       _mm256_blendv_ps(_mm256_permutevar8x32_ps(low_table, code),
                                        _mm256_permutevar8x32_ps(high_table, code), is_high));
    }
#endif
  }
#endif
  for (; i < n; ++i) out[i] = level[packed[i / 2] >> i % 2 * 4 & 15];
}

}  // namespace
}  // namespace quaver::cpu::QUAVER_ISA
