// Sums of gradients, compiled once per instruction set as simd.cpp is. FP8 is added in registers,
// other types through buffers.
#include "simd_sum.h"

#include <algorithm>

#include "code_squares.h"
#include "quaver/grad.h"
#include "span.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

uint32_t max_code_of(DType type) {
  return type == DType::e4m3 ? Format<e4m3>::max_code : Format<e5m2>::max_code;
}

// Adds n <= kBlock values to those in `sum`.
void add_span(float* __restrict sum, const void* x, DType type, float scale, int64_t n) {
  alignas(64) float values[kBlock];
  load_any(values, x, type, n, scale);
  QUAVER_SIMD
  for (int64_t j = 0; j < n; ++j) sum[j] += values[j];
}

#if defined(__AVX2__)
QUAVER_INLINE Values sum_of(const Values& a, const Values& b) {
  Values v;
  for (int k = 0; k < kRegisters; ++k) v.of[k] = QUAVER_PS(add)(a.of[k], b.of[k]);
  return v;
}

QUAVER_INLINE Integers largest_of(Integers most, const Values& x) {
  for (int k = 0; k < kRegisters; ++k) most = larger_bits(most, magnitude_bits(x.of[k]));
  return most;
}

QUAVER_INLINE int count_equal(Integers codes, uint32_t code) {
  const Integers wanted = QUAVER_INT(set1_epi8)(static_cast<char>(code));
#if defined(__AVX512F__)
  return __builtin_popcountll(_mm512_cmpeq_epi8_mask(codes, wanted));
#else
  return __builtin_popcount(
      static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(codes, wanted))));
#endif
}

// Adds the spans' whole registers; returns how many values those are.
template <class T>
int64_t add_registers(T* out, float inverse, const T* a, float scale_a, const T* b, float scale_b,
                      int64_t n, uint32_t* amax_bits) {
  if (!halves_are_exact(scale_a) || !halves_are_exact(scale_b)) return 0;
  Integers most = all(0);
  int64_t i = 0;
  for (; i + kValues <= n; i += kValues) {
    prefetch(a + i);
    prefetch(b + i);
    const Values sum = sum_of(load_values(a + i, scale_a), load_values(b + i, scale_b));
    most = largest_of(most, sum);
    if (out != nullptr) store_codes(out + i, encoded_values<T>(scaled(sum, inverse)));
  }
  *amax_bits = largest_bits(most);
  return i;
}

template <class T>
int64_t sum_registers(T* out, float sum_scale, const ShardSpan& s, int64_t n, uint32_t* amax_bits,
                      int32_t* at_max) {
  if (!halves_are_exact(s.scale)) return 0;
  const bool exact = is_power_of_two(sum_scale);
  const Integers magnitude = QUAVER_INT(set1_epi8)(0x7f);
  Integers most = all(0);
  int64_t i = 0;
  int32_t count = 0;  // of codes at the maximum
  for (; i + kValues <= n; i += kValues) {
    const T* x = static_cast<const T*>(s.first) + i;
    Values sum = load_values(x, s.scale);
    for (int64_t r = 1; r < s.ranks; ++r) {
      prefetch(x + r * s.stride);
      sum = sum_of(sum, load_values(x + r * s.stride, s.scale));
    }
    most = largest_of(most, sum);
    const Integers codes =
        encoded_values<T>(exact ? scaled(sum, 1.0f / sum_scale) : divided(sum, sum_scale));
    store_codes(out + i, codes);
    count += count_equal(both(codes, magnitude), Format<T>::max_code);
  }
  *at_max += count;
  *amax_bits = largest_bits(most);
  return i;
}

// Adds the squares of the whole rows of kNormLanes values to their lanes, a few lanes at a time
// through all rows: their sums stay in registers. Prefetches as many rows behind them, in order,
// for the call that follows: nothing here reads memory in order.
template <class T>
void square_rows(double* lanes, const T* x, int64_t rows) {
  for (int64_t first = 0; first < kNormLanes; first += kValues) {
    Doubles sum[kRegisters];
    for (Doubles& s : sum) s = {QUAVER_PD(setzero)(), QUAVER_PD(setzero)()};
    for (int64_t r = 0; r < rows; ++r) {
      const T* next = x + rows * kNormLanes + first * rows + r * kValues;
      for (int64_t i = 0; i < kValues; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(next + i);
      const Values v = load_values(x + r * kNormLanes + first);
      for (int k = 0; k < kRegisters; ++k) {
        const Doubles d = doubles_of(v.of[k]);
        sum[k].low = QUAVER_PD(fmadd)(d.low, d.low, sum[k].low);
        sum[k].high = QUAVER_PD(fmadd)(d.high, d.high, sum[k].high);
      }
    }
    for (int k = 0; k < kRegisters; ++k) {
      double* to = lanes + first + k * kRegister;
      QUAVER_PD(store)(to, sum[k].low);
      QUAVER_PD(store)(to + kRegister / 2, sum[k].high);
    }
  }
}

// Of e4m3, in integers, except for what is left of a register.
double sum_squares(const e4m3* x, int64_t n, uint32_t* amax_bits) {
  const int64_t whole = n - n % kCodes;
  uint8_t most = 0;
  double sum = sum_code_squares(x, whole, &most);
  for (int64_t i = whole; i < n; ++i) {
    const double v = decode(x[i]);
    sum += v * v;
    most = std::max<uint8_t>(most, x[i].bits & 0x7f);
  }
  const float amax = decode(e4m3{most});
  *amax_bits = bit_cast<uint32_t>(amax);
  return amax == amax ? sum : double(amax);
}
#endif

}  // namespace

uint32_t add(void* out, DType out_type, float scale, const void* a, DType a_type, float scale_a,
             const void* b, DType b_type, float scale_b, int64_t n) {
  alignas(64) float sum[kBlock];
  uint32_t result = 0;
  int64_t i = 0;
#if defined(__AVX2__)
  if (is_fp8(a_type) && a_type == b_type && (out == nullptr || out_type == a_type)) {
    auto run = [&](auto* x) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
      return add_registers(static_cast<T*>(out), 1.0f / scale, x, scale_a, static_cast<const T*>(b),
                           scale_b, n, &result);
    };
    i = a_type == DType::e4m3 ? run(static_cast<const e4m3*>(a)) : run(static_cast<const e5m2*>(a));
  }
#endif
  for (; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    load_any(sum, at(a, a_type, i), a_type, m, scale_a);
    add_span(sum, at(b, b_type, i), b_type, scale_b, m);
    if (out != nullptr) store_any(at(out, out_type, i), out_type, sum, m, 1.0f / scale);
    result = std::max(result, amax_code<uint32_t>(sum, m));
  }
  return result;
}

uint32_t sum_shards(void* out, DType out_type, float sum_scale, const ShardSpan& s, int64_t n,
                    int32_t* at_max) {
  alignas(64) float sum[kBlock];
  uint32_t result = 0;
  int64_t i = 0;
#if defined(__AVX2__)
  if (is_fp8(s.type) && out_type == s.type) {
    auto run = [&](auto* to) { return sum_registers(to, sum_scale, s, n, &result, at_max); };
    i = out_type == DType::e4m3 ? run(static_cast<e4m3*>(out)) : run(static_cast<e5m2*>(out));
  }
#endif
  for (; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    load_any(sum, at(s.first, s.type, i), s.type, m, s.scale);
    for (int64_t r = 1; r < s.ranks; ++r)
      add_span(sum, at(s.first, s.type, r * s.stride + i), s.type, s.scale, m);
    result = std::max(result, amax_code<uint32_t>(sum, m));
    char* to = at(out, out_type, i);
    if (is_power_of_two(sum_scale))
      store_any(to, out_type, sum, m, 1.0f / sum_scale);
    else
      store_divided_any(to, out_type, sum, m, sum_scale);
    for (int64_t j = 0; is_fp8(out_type) && j < m; ++j)
      *at_max += (static_cast<uint8_t>(to[j]) & 0x7fu) == max_code_of(out_type);
  }
  return result;
}

double sum_squares(const void* x, DType type, int64_t n, uint32_t* amax_bits) {
#if defined(__AVX2__)
  // Such a sum is exact, and so the same in any order.
  if (type == DType::e4m3 && n <= kMostCodes)
    return sum_squares(static_cast<const e4m3*>(x), n, amax_bits);
#endif
  constexpr int group = 16, groups = kNormLanes / group;
  static_assert(kNormLanes == kBlock, "a lane is a place in the buffer");
  alignas(64) double lanes[kNormLanes] = {};
  alignas(64) float buffer[kBlock];
  int64_t i = 0;
#if defined(__AVX2__)
  with_type(type, x, [&](auto* values) { square_rows(lanes, values, n / kNormLanes); });
  i = n - n % kNormLanes;
#endif
  for (; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    load_any(buffer, at(x, type, i), type, m, 1.0f);
    QUAVER_SIMD
    for (int64_t j = 0; j < m; ++j) {
      const double v = buffer[j];
      lanes[j] += v * v;
    }
  }
  *amax_bits = amax_any(x, type, n);  // of the nearest caches
  double sums[groups];
  for (int g = 0; g < groups; ++g) {
    sums[g] = 0.0;
    for (int k = 0; k < group; ++k) sums[g] += lanes[g * group + k];
  }
  for (int half = groups / 2; half > 0; half /= 2)
    for (int g = 0; g < half; ++g) sums[g] += sums[g + half];
  return sums[0];
}

}  // namespace quaver::cpu::QUAVER_ISA
