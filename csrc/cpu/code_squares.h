// The sum of the squares of e4m3 codes, in integers. A magnitude is m * 2^k times the smallest one,
// with m < 16 and k <= 14, so that a square is m^2 * 4^k of the smallest square: an unsigned byte
// times a power of two, which is a signed byte within a range of four k. Each range has its sum;
// what is multiplied and added there is the work of one instruction on 32 or 64 codes.
//
// For simd*.cpp only, which are compiled once per instruction set; empty without AVX2.
#pragma once

#include "span.h"

#if defined(__AVX2__)
namespace quaver::cpu::QUAVER_ISA {
namespace {

constexpr int64_t kCodes = sizeof(Integers);  // in a register
constexpr int kPowerRanges = 4;               // of k
constexpr int64_t kMostCodes = 1 << 14;       // so many have sums within 32 bits

// A table of 16 bytes for shuffle_epi8, in each part of a register.
template <class Entry>
inline Integers byte_table(Entry entry) {
  alignas(64) uint8_t bytes[kCodes];
  for (int i = 0; i < kCodes; ++i) bytes[i] = static_cast<uint8_t>(entry(i % 16));
  return QUAVER_BITS(load)(reinterpret_cast<const Integers*>(bytes));
}

inline int64_t sum_of_words(Integers x) {
  alignas(64) uint32_t words[kRegister];
  QUAVER_BITS(store)(reinterpret_cast<Integers*>(words), x);
  int64_t sum = 0;
  for (uint32_t w : words) sum += w;
  return sum;
}

// Sums the squares of the whole registers of n <= kMostCodes codes. NaN counts as 480; `most` is
// the largest code, and NaN's the largest there is. The sum is exact: below 2^50 of its unit.
inline double sum_code_squares(const e4m3* x, int64_t n, uint8_t* most) {
  const Integers square_of = byte_table([](int m) { return m * m; });
  Integers power_of[kPowerRanges], sum[kPowerRanges];
  for (int range = 0; range < kPowerRanges; ++range) {
    // Of an exponent's code, which is k + 1, or 0 of subnormals, whose k is 0.
    power_of[range] = byte_table([&](int exponent) {
      const int k = exponent == 0 ? 0 : exponent - 1;
      return k / 4 == range ? 1 << 2 * (k % 4) : 0;
    });
    sum[range] = all(0);
  }
  const Integers ones = QUAVER_INT(set1_epi16)(1);
  Integers largest = all(0);
  for (int64_t i = 0; i + kCodes <= n; i += kCodes) {
    prefetch_far(x + i, kCodes);
    const Integers codes = QUAVER_BITS(loadu)(reinterpret_cast<const Integers*>(x + i));
    const Integers magnitude = both(codes, QUAVER_INT(set1_epi8)(0x7f));
    largest = QUAVER_INT(max_epu8)(largest, magnitude);
    const Integers exponent = both(magnitude, QUAVER_INT(set1_epi8)(0x78));
    const Integers hidden = QUAVER_INT(min_epu8)(exponent, QUAVER_INT(set1_epi8)(8));
    const Integers mantissa = both(magnitude, QUAVER_INT(set1_epi8)(7));
    const Integers square =
        QUAVER_INT(shuffle_epi8)(square_of, QUAVER_INT(add_epi8)(mantissa, hidden));
    const Integers place = QUAVER_INT(srli_epi16)(exponent, 3);  // within bytes: 3 bits are zero
    for (int range = 0; range < kPowerRanges; ++range) {
      const Integers power = QUAVER_INT(shuffle_epi8)(power_of[range], place);
      const Integers pairs = QUAVER_INT(maddubs_epi16)(square, power);  // at most 2 * 225 * 64
      sum[range] = QUAVER_INT(add_epi32)(sum[range], QUAVER_INT(madd_epi16)(pairs, ones));
    }
  }
  alignas(64) uint8_t seen[kCodes];
  QUAVER_BITS(store)(reinterpret_cast<Integers*>(seen), largest);
  for (uint8_t code : seen) *most = code > *most ? code : *most;
  int64_t total = 0;
  for (int range = 0; range < kPowerRanges; ++range) total += sum_of_words(sum[range]) << 8 * range;
  return static_cast<double>(total) * 0x1p-18;
}

}  // namespace
}  // namespace quaver::cpu::QUAVER_ISA
#endif  // __AVX2__
