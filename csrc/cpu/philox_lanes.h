// Philox by AVX2's 32 x 32 -> 64 bit multiplication, and the stochastic rounding to bf16 that it is
// for. The bits of philox.h and codec.h.
//
// For simd*.cpp only, which are compiled once per instruction set.
#pragma once

#include <immintrin.h>

#include "quaver/codec.h"
#include "quaver/philox.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

// The random bits of 32 elements, of counters `first` to first + 7. Two vectors of four counters go
// in step. A word is the low half of 64 bits; the upper half is what multiplications left there.
inline __attribute__((always_inline)) void philox_32(uint64_t seed, uint64_t first, uint64_t offset,
                                                     __m256i (&random)[4]) {
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53u), m1 = _mm256_set1_epi64x(0xCD9E8D57u);
  // In the order that the unpacking below puts right.
  const __m256i order = _mm256_setr_epi64x(0, 2, 1, 3);
  __m256i k0 = _mm256_set1_epi64x(static_cast<int64_t>(seed));
  __m256i k1 = _mm256_srli_epi64(k0, 32);
  __m256i c0[2], c1[2], c2[2], c3[2];
  for (int s = 0; s < 2; ++s) {
    c0[s] = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first + 4 * s)), order);
    c1[s] = _mm256_srli_epi64(c0[s], 32);
    c2[s] = _mm256_set1_epi64x(static_cast<int64_t>(offset));
    c3[s] = _mm256_srli_epi64(c2[s], 32);
  }
  for (int round = 0; round < 10; ++round) {
    for (int s = 0; s < 2; ++s) {
      const __m256i p0 = _mm256_mul_epu32(m0, c0[s]), p1 = _mm256_mul_epu32(m1, c2[s]);
      c0[s] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c1[s], k0));
      c2[s] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c3[s], k1));
      c1[s] = p1;
      c3[s] = p0;
    }
    k0 = _mm256_add_epi32(k0, _mm256_set1_epi32(static_cast<int>(0x9E3779B9u)));
    k1 = _mm256_add_epi32(k1, _mm256_set1_epi32(static_cast<int>(0xBB67AE85u)));
  }
  for (int s = 0; s < 2; ++s) {
    const __m256i low = _mm256_blend_epi32(c0[s], _mm256_slli_epi64(c1[s], 32), 0xaa);
    const __m256i high = _mm256_blend_epi32(c2[s], _mm256_slli_epi64(c3[s], 32), 0xaa);
    random[2 * s] = _mm256_unpacklo_epi64(low, high);
    random[2 * s + 1] = _mm256_unpackhi_epi64(low, high);
  }
}

// encode_bf16_stochastic of 8 values, as 32-bit codes.
inline __m256i bf16_stochastic(__m256 x, __m256i random) {
  const __m256i bits = _mm256_castps_si256(x), exponent = _mm256_set1_epi32(0x7f800000);
  const __m256i special = _mm256_cmpeq_epi32(_mm256_and_si256(bits, exponent), exponent);
  const __m256i noise = _mm256_and_si256(random, _mm256_set1_epi32(0xffff));
  const __m256i up = _mm256_add_epi32(bits, _mm256_andnot_si256(special, noise));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fff), nan);
}

// Elements 4 * first and following; returns how many of n were done, all but the last few.
inline int64_t store_bf16_stochastic(bf16* out, const float* x, int64_t n, uint64_t seed,
                                     uint64_t first, uint64_t offset) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    __m256i random[4];
    philox_32(seed, first + static_cast<uint64_t>(i / 4), offset, random);
    for (int k = 0; k < 4; k += 2) {
      const float* from = x + i + 8 * k;
      const __m256i codes =
          _mm256_packus_epi32(bf16_stochastic(_mm256_loadu_ps(from), random[k]),
                              bf16_stochastic(_mm256_loadu_ps(from + 8), random[k + 1]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i + 8 * k),
                          _mm256_permute4x64_epi64(codes, 0xd8));
    }
  }
  return i;
}

}  // namespace
}  // namespace quaver::cpu::QUAVER_ISA
