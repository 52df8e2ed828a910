// FP8 from bf16, and back, as words of 16 bits, under a scale that is a power of two: no f32 in
// between, and twice as many values in a register. Such a scale moves the exponent alone, so that a
// code is the upper bits of a magnitude, rounded to nearest even by an addition, less the code of
// an exponent. Under any other scale AVX-512 looks codes up. Both hold for zeros and for quotients
// that are normal numbers of the format or above; values with another one among them go through f32
// (registers.h), with the same bits.
//
// For simd*.cpp only, which are compiled once per instruction set; empty without AVX2.
#pragma once

#include <algorithm>

#include "span.h"

#if defined(__AVX2__)
namespace quaver::cpu::QUAVER_ISA {
namespace {

constexpr int64_t kWords = 2 * kRegister;  // in a register

// What a scale means to words: the smallest magnitude with a normal quotient, and that magnitude's
// code before it is rounded, less the one that it has in the format.
struct WordScale {
  uint16_t least, base;
};

// Of `factor`, by which the values are multiplied. False where it is no power of two, or none of
// bf16's normal numbers has that smallest quotient.
template <class T>
inline bool word_scale(WordScale* to, float factor) {
  using F = Format<T>;
  const int power = static_cast<int>(bit_cast<uint32_t>(factor) >> 23) - 127;
  const int exponent = 127 + 1 - F::bias - power;
  if (!is_power_of_two(factor) || exponent < 1 || exponent > 254) return false;
  *to = {static_cast<uint16_t>(exponent << 7),
         static_cast<uint16_t>((exponent - 1) << F::mantissa)};
  return true;
}

// Two registers of words.
struct Words {
  Integers of[2];
};

QUAVER_INLINE Integers all_words(int x) { return QUAVER_INT(set1_epi16)(static_cast<short>(x)); }

QUAVER_INLINE Integers load_register(const uint16_t* x) {
  return QUAVER_BITS(loadu)(reinterpret_cast<const Integers*>(x));
}
QUAVER_INLINE Words load_words(const uint16_t* x) {
  return {{load_register(x), load_register(x + kWords)}};
}

QUAVER_INLINE Words word_magnitudes(const Words& x) {
  return {{both(x.of[0], all_words(0x7fff)), both(x.of[1], all_words(0x7fff))}};
}

// Whether all magnitudes are zero, or from `least` on and no NaN.
QUAVER_INLINE bool have_codes(const Words& magnitude, const Words& least) {
#if defined(__AVX512F__)
  auto other = [&](int k) {
    const __m512i m = magnitude.of[k];
    return _mm512_cmpgt_epu16_mask(m, all_words(0x7f80)) |
           (_mm512_test_epi16_mask(m, m) & _mm512_cmplt_epu16_mask(m, least.of[k]));
  };
  return (other(0) | other(1)) == 0;
#else
  auto other = [&](int k) {
    const __m256i m = magnitude.of[k];
    const __m256i small = both(_mm256_cmpgt_epi16(least.of[k], m), _mm256_cmpgt_epi16(m, all(0)));
    return _mm256_or_si256(small, _mm256_cmpgt_epi16(m, all_words(0x7f80)));
  };
  const __m256i any = _mm256_or_si256(other(0), other(1));
  return _mm256_testz_si256(any, any) != 0;
#endif
}

// Codes of magnitudes, a word each, with the signs of x: a byte each, in order.
QUAVER_INLINE Integers packed_codes(const Words& x, Integers first, Integers second) {
  const Integers codes = bytes(first, second);
  const Integers signs = QUAVER_INT(packs_epi16)(x.of[0], x.of[1]);  // saturation keeps them
#if defined(__AVX512F__)
  return _mm512_permutexvar_epi64(
      _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7),
      _mm512_ternarylogic_epi32(codes, signs, _mm512_set1_epi8(-0x80), 0xf8));
#else
  return _mm256_permute4x64_epi64(_mm256_or_si256(codes, both(signs, _mm256_set1_epi8(-0x80))),
                                  0xd8);
#endif
}

// The codes of values that have_codes, in order.
template <class T>
QUAVER_INLINE Integers word_codes(const Words& x, const Words& magnitude, const Words& base) {
  using F = Format<T>;
  constexpr int drop = 7 - F::mantissa;
  auto code = [&](int k) {
    const Integers odd = both(QUAVER_INT(srli_epi16)(magnitude.of[k], drop), all_words(1));
    const Integers sum = QUAVER_INT(add_epi16)(
        QUAVER_INT(add_epi16)(magnitude.of[k], all_words((1 << (drop - 1)) - 1)), odd);
    return QUAVER_INT(min_epu16)(
        QUAVER_INT(subs_epu16)(QUAVER_INT(srli_epi16)(sum, drop), base.of[k]),
        all_words(F::max_code));
  };
  return packed_codes(x, code(0), code(1));
}

// The codes of a scale that is a power of two.
template <class T>
struct ExactWords {
  Words least, base;

  explicit ExactWords(const WordScale& scale)
      : least{{all_words(scale.least), all_words(scale.least)}},
        base{{all_words(scale.base), all_words(scale.base)}} {}
  QUAVER_INLINE Integers codes(const Words& x, const Words& magnitude) const {
    return word_codes<T>(x, magnitude, base);
  }
};

// Encodes what `coder` has codes for, and the rest by encode(out, x, n <= kValues). Returns the
// bits of the amax of x, as bf16, where it is to see it. `ahead`: prefetches beyond the span.
template <bool kSee, class T, class Coder, class Encode>
inline uint16_t cast_words_by(T* __restrict out, const bf16* __restrict x, int64_t n,
                              const Coder& coder, bool ahead, Encode encode) {
  Integers most = all(0);
  int64_t i = 0;
  for (; i + kValues <= n; i += kValues) {
    if (ahead) prefetch(x + i, kValues * int64_t(sizeof(bf16)));
    const Words w = load_words(reinterpret_cast<const uint16_t*>(x + i));
    const Words magnitude = word_magnitudes(w);
    if (kSee)
      most = QUAVER_INT(max_epu16)(most, QUAVER_INT(max_epu16)(magnitude.of[0], magnitude.of[1]));
    if (__builtin_expect(have_codes(magnitude, coder.least), 1))
      store_codes(out + i, coder.codes(w, magnitude));
    else
      encode(out + i, x + i, kValues);
  }
  alignas(64) uint16_t seen[kWords] = {};
  if (kSee) QUAVER_BITS(store)(reinterpret_cast<Integers*>(seen), most);
  const uint16_t bits = amax_code<uint16_t>(reinterpret_cast<const bf16*>(seen), kWords);
  if (i == n) return bits;
  encode(out + i, x + i, n - i);
  return kSee ? std::max(bits, amax_code<uint16_t>(x + i, n - i)) : bits;
}

// Multiplies by `factor`, a power of two, and encodes.
template <bool kSee, class T>
inline uint16_t cast_words(T* __restrict out, const bf16* __restrict x, int64_t n, float factor,
                           bool ahead) {
  auto encode = [&](T* to, const bf16* from, int64_t count) {
    alignas(64) float values[kValues];
    load(values, from, count, 1.0f);
    store(to, values, count, factor);
  };
  WordScale scale = {0, 0};
  if (word_scale<T>(&scale, factor))
    return cast_words_by<kSee>(out, x, n, ExactWords<T>(scale), ahead, encode);
  for (int64_t i = 0; i < n; i += kValues) encode(out + i, x + i, std::min(kValues, n - i));
  return kSee ? amax_code<uint16_t>(x, n) : uint16_t(0);
}

#if defined(__AVX512F__)
// The codes of any scale. How a quotient is rounded depends on the mantissa of x alone, of which
// bf16 has 128, while its exponent only moves: so codes are looked up, and moved.
template <class T>
class WordTable {
 public:
  // Of x * factor, or of x / factor; null where there is none or too little was cast with it. A
  // thread keeps that of its last scale.
  static const WordTable* of(float factor, bool divide, int64_t n) {
    static thread_local WordTable last;
    if (last.factor_ != factor || last.divide_ != divide) last = WordTable(factor, divide);
    last.cast_ += n;
    if (last.cast_ < kWorthwhile) return nullptr;
    if (!last.built_) last.build();
    return last.usable_ ? &last : nullptr;
  }

  Words least;
  QUAVER_INLINE Integers codes(const Words& x, const Words& magnitude) const {
    return packed_codes(x, code(magnitude.of[0]), code(magnitude.of[1]));
  }

 private:
  static constexpr int64_t kWorthwhile = 1 << 14;  // values

  WordTable() = default;
  WordTable(float factor, bool divide) : factor_(factor), divide_(divide) {}

  float quotient(uint16_t magnitude) const {
    const float x = decode(bf16{magnitude});
    return divide_ ? x / factor_ : x * factor_;
  }
  void build();

  QUAVER_INLINE Integers code(Integers magnitude) const {
    const auto half = [&](int i) {
      return _mm512_permutex2var_epi16(load_words(codes_ + 64 * i).of[0], magnitude,
                                       load_words(codes_ + 64 * i).of[1]);
    };
    const __mmask32 upper = _mm512_test_epi16_mask(magnitude, all_words(0x40));
    const Integers rounded = _mm512_mask_mov_epi16(half(0), upper, half(1));
    const Integers exponent =
        _mm512_slli_epi16(_mm512_srli_epi16(magnitude, 7), Format<T>::mantissa);
    return _mm512_min_epu16(
        _mm512_subs_epu16(_mm512_add_epi16(rounded, exponent), all_words(base_)),
        all_words(Format<T>::max_code));
  }

  float factor_ = 0.0f;
  bool divide_ = false, built_ = false, usable_ = false;
  int64_t cast_ = 0;
  uint16_t base_ = 0;
  alignas(64) uint16_t codes_[128];  // of each mantissa, under the exponent that base_ is for
};

template <class T>
void WordTable<T>::build() {
  using F = Format<T>;
  built_ = true;
  // The smallest magnitude with a normal quotient, found by halving: quotients are in order.
  const float smallest = bit_cast<float>(uint32_t(127 + 1 - F::bias) << 23);
  uint16_t low = 0, high = 0x7f80;
  while (high - low > 1) {
    const uint16_t middle = static_cast<uint16_t>((low + high) / 2);
    (quotient(middle) >= smallest ? high : low) = middle;
  }
  // One exponent above, where all quotients are normal, and of which no code is 0.
  const int exponent = (high >> 7) + 1;
  usable_ = factor_ > 0.0f && exponent > 16 && exponent < 250;
  if (!usable_) return;
  least = {{all_words(high), all_words(high)}};
  base_ = static_cast<uint16_t>(exponent << F::mantissa);
  for (int m = 0; m < 128; ++m)
    codes_[m] = encode_nearest<T>(quotient(static_cast<uint16_t>(exponent << 7 | m))).bits;
}
#endif

// Codes as words with copies of the sign above them, two registers.
template <class T>
QUAVER_INLINE Words load_codes(const T* x) {
  return {{widen(x), widen(x + kWords)}};
}

// The codes as bf16, which holds them exactly. False, and nothing is stored, where a magnitude is
// below the normal numbers and not zero, or no number.
template <class T>
QUAVER_INLINE bool store_as_bf16(bf16* out, const Words& codes) {
  using F = Format<T>;
  const Integers least = all_words(1 << F::mantissa);
  const Integers rebias = all_words((127 - F::bias) << 7);
  Words words;
  for (int k = 0; k < 2; ++k) {
    const Integers c = codes.of[k], magnitude = both(c, all_words(0x7f));
    const Integers shifted = QUAVER_INT(slli_epi16)(magnitude, 7 - F::mantissa);
#if defined(__AVX512F__)
    const __mmask32 some = _mm512_test_epi16_mask(magnitude, magnitude);
    const __mmask32 small = _mm512_cmplt_epu16_mask(magnitude, least);
    const __mmask32 large = _mm512_cmpgt_epu16_mask(magnitude, all_words(F::max_code));
    if (__builtin_expect(((some & small) | large) != 0, 0)) return false;
    words.of[k] = _mm512_ternarylogic_epi32(_mm512_maskz_add_epi16(some, shifted, rebias), c,
                                            all_words(0x8000), 0xf8);
#else
    const Integers zero = _mm256_cmpeq_epi16(magnitude, all(0));
    const Integers small = _mm256_andnot_si256(zero, _mm256_cmpgt_epi16(least, magnitude));
    const Integers large = _mm256_cmpgt_epi16(magnitude, all_words(F::max_code));
    const Integers other = _mm256_or_si256(small, large);
    if (__builtin_expect(_mm256_testz_si256(other, other) == 0, 0)) return false;
    words.of[k] = _mm256_or_si256(_mm256_andnot_si256(zero, _mm256_add_epi16(shifted, rebias)),
                                  both(c, all_words(0x8000)));
#endif
  }
  for (int k = 0; k < 2; ++k)
    QUAVER_BITS(storeu)(reinterpret_cast<Integers*>(out + k * kWords), words.of[k]);
  return true;
}

template <class T>
inline void decode_words(bf16* __restrict out, const T* __restrict x, int64_t n) {
  alignas(64) float values[kValues];
  for (int64_t i = 0; i < n; i += kValues) {
    const int64_t m = std::min(kValues, n - i);
    prefetch(x + i);
    if (m == kValues && store_as_bf16<T>(out + i, load_codes(x + i))) continue;
    load(values, x + i, m, 1.0f);
    store(out + i, values, m, 1.0f);
  }
}

}  // namespace
}  // namespace quaver::cpu::QUAVER_ISA
#endif  // __AVX2__
