// Philox's words of a span of elements, equal to random_bits; each block is drawn once for its four
// elements.
//
// For simd*.cpp only, which are compiled once per instruction set.
#pragma once

#include "quaver/philox.h"
#include "span.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

constexpr int64_t kDrawn = 32;  // words at a time

// out[j] = random_bits(seed, first + j, offset) for j < n, and on to the next multiple of kDrawn.
// `first` begins a block: it is a multiple of four.
inline void random_words(uint32_t* __restrict out, uint64_t seed, uint64_t first, uint64_t offset,
                         int64_t n) {
  for (int64_t j = 0; j < n; j += kDrawn) {
    const uint64_t block = (first + static_cast<uint64_t>(j)) / 4;
#if defined(__AVX2__)
    // Each 64-bit lane holds a block in its lower half, which is all that the multiply reads. Two
    // sets of blocks are in flight, to hide the latency of the multiplies.
    constexpr int sets = kDrawn / 16;
    __m256i c0[sets], c1[sets], c2[sets], c3[sets];
    for (int s = 0; s < sets; ++s) {
      const __m256i own = _mm256_setr_epi64x(4 * s, 4 * s + 1, 4 * s + 2, 4 * s + 3);
      c0[s] = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(block)), own);
      c1[s] = _mm256_srli_epi64(c0[s], 32);
      c2[s] = _mm256_set1_epi64x(static_cast<int64_t>(offset));
      c3[s] = _mm256_srli_epi64(c2[s], 32);
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
      for (int s = 0; s < sets; ++s) {
        const __m256i p0 = _mm256_mul_epu32(c0[s], _mm256_set1_epi64x(kPhiloxM0));
        const __m256i p1 = _mm256_mul_epu32(c2[s], _mm256_set1_epi64x(kPhiloxM1));
        c0[s] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1[s]), key0);
        c2[s] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3[s]), key1);
        c1[s] = p1;
        c3[s] = p0;
      }
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    auto* words = reinterpret_cast<__m256i*>(out + j);
    for (int s = 0; s < sets; ++s) {
      const __m256i low = _mm256_blend_epi32(c0[s], _mm256_slli_epi64(c1[s], 32), 0xaa);
      const __m256i high = _mm256_blend_epi32(c2[s], _mm256_slli_epi64(c3[s], 32), 0xaa);
      const __m256i even = _mm256_unpacklo_epi64(low, high);
      const __m256i odd = _mm256_unpackhi_epi64(low, high);
      _mm256_storeu_si256(words++, _mm256_permute2x128_si256(even, odd, 0x20));
      _mm256_storeu_si256(words++, _mm256_permute2x128_si256(even, odd, 0x31));
    }
#else
    for (int64_t b = 0; b < kDrawn / 4; ++b) {
      const Philox4 four = philox4x32(seed, block + static_cast<uint64_t>(b), offset);
      for (int k = 0; k < 4; ++k) out[j + 4 * b + k] = four.word[k];
    }
#endif
  }
}

}  // namespace
}  // namespace quaver::cpu::QUAVER_ISA
