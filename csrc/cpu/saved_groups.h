// Rows of saved groups (quaver/cast.h) in the loops of simd_activation.cpp: encoded from values,
// and decoded.
//
// For simd*.cpp only, which are compiled once per instruction set.
#pragma once

#include "simd_activation.h"
#include "span.h"
#if defined(__AVX2__)
#include "lanes.h"
#include "words.h"
#endif

namespace quaver::cpu::QUAVER_ISA {
namespace {

// Chooses and stores the scale of one group; returns its inverse.
inline float choose_group(uint8_t* scale, uint32_t amax_bits) {
  const uint32_t code = block_exponent(amax_bits);
  *scale = static_cast<uint8_t>(code);
  return block_inverse(code);
}

// Encodes whole groups and perhaps a short last one, at most kBlock values in all. A constant
// `block` gives loops without remainders.
template <class Block>
inline __attribute__((always_inline)) void save_few(e4m3* codes, uint8_t* scale,
                                                    const float* __restrict x, int64_t n,
                                                    Block block) {
  alignas(64) float scaled[kBlock];
  for (int64_t i = 0; i < n; i += block) {
    const int64_t m = n - i < block ? n - i : int64_t{block};
    const float inverse = choose_group(scale + i / block, amax_code<uint32_t>(x + i, m));
    QUAVER_SIMD
    for (int64_t j = 0; j < m; ++j) scaled[i + j] = x[i + j] * inverse;
  }
  store(codes, scaled, n, 1.0f);
}

#if defined(__AVX2__)
constexpr int64_t kGroups = kBlock / 32;  // of 32, in a buffer
static_assert(kGroups == 16, "largest_of_16 looks at all of them at once");

// What the amaxes of groups choose.
struct GroupScales {
  alignas(64) uint32_t code[kGroups];
  alignas(64) float inverse[kGroups];

  // Of `most`, the bits of each group's amax.
  QUAVER_INLINE explicit GroupScales(const Integers* most) {
    alignas(64) uint32_t amax[kGroups];
    memcpy(amax, most, sizeof(amax));
    QUAVER_SIMD
    for (int64_t g = 0; g < kGroups; ++g) {
      code[g] = block_exponent(amax[g]);
      inverse[g] = block_inverse(code[g]);
    }
  }
  void store(uint8_t* scale, int64_t groups) const {
    for (int64_t g = 0; g < groups; ++g) scale[g] = static_cast<uint8_t>(code[g]);
  }
};

// kValues values from memory by the scales of their groups, of which g is the first.
template <class T>
QUAVER_INLINE void encode_groups(e4m3* codes, const T* x, const GroupScales& scales, int64_t g) {
  Values v = load_values(x);
  for (int k = 0; k < kRegisters; ++k)
    v.of[k] = QUAVER_PS(mul)(v.of[k], all(scales.inverse[g + k * kRegister / 32]));
  encode_values(codes, v);
}

// As save_few above, of groups of 32 in registers: first all scales, then all codes.
inline void save_few(e4m3* codes, uint8_t* scale, const float* __restrict x, int64_t n,
                     std::integral_constant<int64_t, 32> block) {
  const int64_t whole = n - n % kValues;
  Integers most[kGroups];
  for (int64_t g = 0; g < whole / 32; ++g) {
    most[g] = magnitude_bits(QUAVER_PS(loadu)(x + 32 * g));
    for (int64_t j = kRegister; j < 32; j += kRegister)
      most[g] = larger_bits(most[g], magnitude_bits(QUAVER_PS(loadu)(x + 32 * g + j)));
  }
  for (int64_t g = whole / 32; g < kGroups; ++g) most[g] = all(0);
  Integers amax[kGroups / kRegister];
  largest_of_16(amax, most, larger_bits);
  const GroupScales scales(amax);
  scales.store(scale, whole / 32);
  for (int64_t i = 0; i < whole; i += kValues) encode_groups(codes + i, x + i, scales, i / 32);
  if (whole < n)
    save_few<decltype(block)>(codes + whole, scale + whole / 32, x + whole, n - whole, block);
}

// The same of bf16, as words of 16 bits: a group's scale is a power of two. Returns how many values
// it has saved: whole registers of them.
inline int64_t save_words(e4m3* codes, uint8_t* scale, const bf16* x, int64_t n) {
  using F = Format<e4m3>;
  constexpr uint32_t least_scale = F::bias;  // with normal quotients in bf16
  const int64_t whole = n - n % kValues;
  const auto* words = reinterpret_cast<const uint16_t*>(x);
  auto larger = [](Integers a, Integers b) { return QUAVER_INT(max_epu16)(a, b); };
  Integers most[kGroups];
  for (int64_t g = 0; g < whole / 32; ++g) {
    auto magnitudes = [&](int64_t j) {
      return both(load_register(words + 32 * g + j), all_words(0x7fff));
    };
    most[g] = magnitudes(0);
    for (int64_t j = kWords; j < 32; j += kWords) most[g] = larger(most[g], magnitudes(j));
  }
  for (int64_t g = whole / 32; g < kGroups; ++g) most[g] = all(0);
  Integers amax[kGroups / kRegister];
  largest_of_16(amax, most, larger);
  for (Integers& a : amax)  // the larger of two words becomes the upper half of f32's bits
    a = both(larger(a, QUAVER_INT(slli_epi32)(a, 16)), all(static_cast<int32_t>(0xffff0000)));
  const GroupScales scales(amax);
  scales.store(scale, whole / 32);
  // Under a scale below least_scale only zeros have codes by words.
  alignas(64) uint16_t least[kGroups], base[kGroups];
  QUAVER_SIMD
  for (int64_t g = 0; g < kGroups; ++g) {
    const uint32_t code = scales.code[g];
    least[g] = static_cast<uint16_t>(code < least_scale ? 0x7fff : (code + 1 - F::bias) << 7);
    base[g] = static_cast<uint16_t>((code - F::bias) << F::mantissa);
  }
  for (int64_t i = 0; i < whole; i += kValues) {
    const int64_t g = i / 32, next = g + kValues / 32 - 1;
    const Words w = load_words(words + i), magnitude = word_magnitudes(w);
    if (__builtin_expect(have_codes(magnitude, {{all_words(least[g]), all_words(least[next])}}), 1))
      store_codes(codes + i,
                  word_codes<e4m3>(w, magnitude, {{all_words(base[g]), all_words(base[next])}}));
    else
      encode_groups(codes + i, x + i, scales, g);
  }
  return whole;
}
#endif

// Encodes n <= kBlock values in blocks of any size up to kBlock.
inline void save_few(const SavedRow& to, int64_t first, const float* x, int64_t n) {
  e4m3* codes = reinterpret_cast<e4m3*>(to.codes + first);
  uint8_t* scale = to.scale + first / to.block;
  if (to.block == 32)
    save_few(codes, scale, x, n, std::integral_constant<int64_t, 32>{});
  else if (to.block == 16)
    save_few(codes, scale, x, n, std::integral_constant<int64_t, 16>{});
  else
    save_few(codes, scale, x, n, to.block);
}

// Saves what it can of n <= kBlock values as they are stored; returns how many those are.
#if defined(__AVX2__)
inline int64_t save_stored(const SavedRow& to, int64_t first, const void* x, DType type,
                           int64_t n) {
  if (type != DType::bf16 || to.block != 32) return 0;
  return save_words(reinterpret_cast<e4m3*>(to.codes + first), to.scale + first / 32,
                    static_cast<const bf16*>(x), n);
}
#else
inline int64_t save_stored(const SavedRow&, int64_t, const void*, DType, int64_t) { return 0; }
#endif

#if defined(__AVX2__)
// kValues values of groups of 32, which begin with one.
QUAVER_INLINE Floats load_groups(const e4m3* codes, const uint8_t* scale) {
  Values v;
  for (int k = 0; k < kRegisters; k += 2)
    halves_to_floats(v.of + k, halves_of(e4m3{}, widen(codes + k * kRegister)),
                     kHalvesFactor<e4m3>);
  return each<Floats>(
      [&](int k) { return QUAVER_PS(mul)(v.of[k], all(decode_e8m0(scale[k * kRegister / 32]))); });
}
#endif

// Decodes the columns of a row from `first` on.
inline void load_groups(float* __restrict out, const GroupedRow& row, int64_t first, int64_t n) {
  const auto* codes = reinterpret_cast<const e4m3*>(row.codes + first);
  int64_t i = 0;
#if defined(__AVX2__)
  // The usual groups, in registers and without divisions.
  for (; row.block == 32 && first % 32 == 0 && i + kValues <= n; i += kValues)
    store_lanes(out + i, load_groups(codes + i, row.scale + (first + i) / 32));
#endif
  while (i < n) {
    const int64_t group = (first + i) / row.block;
    const int64_t left = (group + 1) * row.block - (first + i);
    const int64_t m = n - i < left ? n - i : left;
    load(out + i, codes + i, m, decode_e8m0(row.scale[group]));
    i += m;
  }
}

}  // namespace
}  // namespace quaver::cpu::QUAVER_ISA
