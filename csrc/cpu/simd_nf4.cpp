// NF4 codes of blocks of flat elements, which stay in the first-level cache between the two passes
// over them. Compiled once per instruction set as simd.cpp is.
#include "simd_nf4.h"

#include "span.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

uint32_t largest_bits(const float* x, int64_t n) {
  int32_t most = 0;  // signed, because AVX2 compares no unsigned integers
  _Pragma("omp simd reduction(max : most)") for (int64_t i = 0; i < n; ++i) {
    const auto bits = static_cast<int32_t>(bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
    most = most < bits ? bits : most;
  }
  return static_cast<uint32_t>(most);
}

void encode_block(uint8_t* __restrict codes, const float* __restrict x, int64_t n, float inverse) {
  alignas(64) int32_t code[kNf4MaxBlock];
  QUAVER_SIMD
  for (int64_t i = 0; i < n; ++i) code[i] = static_cast<int32_t>(nf4_code(x[i] * inverse));
  if (n % 2 != 0) code[n] = kNf4Zero;
  const int64_t bytes = (n + 1) / 2;
  QUAVER_SIMD
  for (int64_t j = 0; j < bytes; ++j)
    codes[j] = static_cast<uint8_t>(code[2 * j] << 4 | code[2 * j + 1]);
}

void encode(const Nf4View& out, const void* x, DType type) {
  alignas(64) float values[kNf4MaxBlock];
  for (int64_t i = 0; i < out.numel; i += out.block) {
    const int64_t n = out.numel - i < out.block ? out.numel - i : out.block;
    load_any(values, at(x, type, i), type, n, 1.0f);
    const float absmax = nf4_absmax(largest_bits(values, n));
    out.absmax[i / out.block] = absmax;
    encode_block(out.codes + i / 2, values, n, nf4_inverse(absmax));
  }
}

#if defined(__AVX512F__)
// 16 codes of 8 bytes, whose levels are one permutation of a register.
inline void decode16(float* out, const uint8_t* codes, __m512 level, __m512 absmax) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  const __m128i pairs = _mm_unpacklo_epi8(high, _mm_and_si128(bytes, mask));
  const __m512 y = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(pairs), level);
  _mm512_storeu_ps(out, _mm512_mul_ps(y, absmax));
}
#elif defined(__AVX2__)
inline __m256 level8(__m256i code, __m256 low, __m256 high) {
  const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code),
                          is_high);
}
// 16 codes of 8 bytes, whose levels are permutations of two registers.
inline void decode16(float* out, const uint8_t* codes, __m256 low, __m256 high, __m256 absmax) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i upper = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  const __m128i pairs = _mm_unpacklo_epi8(upper, _mm_and_si128(bytes, mask));
  const __m256 a = level8(_mm256_cvtepu8_epi32(pairs), low, high);
  const __m256 b = level8(_mm256_cvtepu8_epi32(_mm_srli_si128(pairs, 8)), low, high);
  _mm256_storeu_ps(out, _mm256_mul_ps(a, absmax));
  _mm256_storeu_ps(out + 8, _mm256_mul_ps(b, absmax));
}
#endif

void decode_block(float* __restrict out, const uint8_t* __restrict codes, int64_t n, float absmax,
                  const float* level) {
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512 all = _mm512_loadu_ps(level), factor = _mm512_set1_ps(absmax);
  for (; i + 16 <= n; i += 16) decode16(out + i, codes + i / 2, all, factor);
#elif defined(__AVX2__)
  const __m256 low = _mm256_loadu_ps(level), high = _mm256_loadu_ps(level + 8);
  const __m256 factor = _mm256_set1_ps(absmax);
  for (; i + 16 <= n; i += 16) decode16(out + i, codes + i / 2, low, high, factor);
#endif
  for (; i < n; ++i) out[i] = level[codes[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15] * absmax;
}

void decode(void* out, DType type, const Nf4View& x) {
  alignas(64) float values[kNf4MaxBlock], level[kNf4Levels];
  for (uint32_t k = 0; k < kNf4Levels; ++k) level[k] = nf4_level(k);
  for (int64_t i = 0; i < x.numel; i += x.block) {
    const int64_t n = x.numel - i < x.block ? x.numel - i : x.block;
    decode_block(values, x.codes + i / 2, n, x.absmax[i / x.block], level);
    store_any(at(out, type, i), type, values, n, 1.0f);
  }
}

}  // namespace

extern const Nf4Simd nf4_table;
const Nf4Simd nf4_table = {encode, decode};

}  // namespace quaver::cpu::QUAVER_ISA
