// Compiled once per instruction set (QUAVER_ISA = portable, avx2, avx512). The loops are plain C++
// over the arithmetic of include/quaver, written so that the compiler vectorises them; only f16,
// for which hardware has an instruction and integer arithmetic is slow, uses intrinsics.
#include "simd.h"

#include "quaver/codec.h"
#include "quaver/norm.h"
#include "quaver/philox.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace quaver::cpu::QUAVER_ISA {
namespace {

#define QUAVER_SIMD _Pragma("omp simd")

template <class T>
void load(float* __restrict out, const T* __restrict x, int64_t n, float scale) {
  QUAVER_SIMD
  for (int64_t i = 0; i < n; ++i) out[i] = TensorCodec<T>::decode(x[i], scale);
}

template <class T>
void store(T* __restrict out, const float* __restrict x, int64_t n, float inverse_scale) {
  QUAVER_SIMD
  for (int64_t i = 0; i < n; ++i) out[i] = TensorCodec<T>::encode(x[i], inverse_scale);
}

template <class T>
void store_divided(T* __restrict out, const float* __restrict x, int64_t n, float scale) {
  QUAVER_SIMD
  for (int64_t i = 0; i < n; ++i) out[i] = encode_nearest<T>(x[i] / scale);
}

#if defined(__F16C__)
// The same bits as fp8.h's f16: saturate and make NaN canonical around the instruction, which does
// neither.
template <>
void load<f16>(float* __restrict out, const f16* __restrict x, int64_t n, float scale) {
  int64_t i = 0;
  const __m256 s = _mm256_set1_ps(scale);
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_cvtph_ps(h), s));
  }
  for (; i < n; ++i) out[i] = TensorCodec<f16>::decode(x[i], scale);
}

void store_f16(f16* __restrict out, const float* __restrict x, int64_t n, float factor,
               bool divide) {
  int64_t i = 0;
  const __m256 s = _mm256_set1_ps(factor);
  const __m256 max = _mm256_set1_ps(Format<f16>::finite_max);
  const __m256 min = _mm256_set1_ps(-Format<f16>::finite_max);
  for (; i + 8 <= n; i += 8) {
    __m256 v = _mm256_loadu_ps(x + i);
    v = divide ? _mm256_div_ps(v, s) : _mm256_mul_ps(v, s);
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    v = _mm256_max_ps(_mm256_min_ps(v, max), min);
    __m128i h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    if (_mm256_movemask_ps(nan) != 0) {
      const __m256i wide = _mm256_castps_si256(nan);
      const __m128i mask =
          _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extractf128_si256(wide, 1));
      h = _mm_blendv_epi8(h, _mm_set1_epi16(0x7fff), mask);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), h);
  }
  for (; i < n; ++i) out[i] = encode_nearest<f16>(divide ? x[i] / factor : x[i] * factor);
}

template <>
void store<f16>(f16* __restrict out, const float* __restrict x, int64_t n, float inverse_scale) {
  store_f16(out, x, n, inverse_scale, false);
}

template <>
void store_divided<f16>(f16* __restrict out, const float* __restrict x, int64_t n, float scale) {
  store_f16(out, x, n, scale, true);
}
#endif

// Calls body(T*) with the storage type of `type`.
template <class Pointer, class Body>
inline __attribute__((always_inline)) void with_type(DType type, Pointer* p, Body body) {
  switch (type) {
    case DType::f32: return body(static_cast<const float*>(p));
    case DType::f16: return body(static_cast<const f16*>(p));
    case DType::bf16: return body(static_cast<const bf16*>(p));
    case DType::e4m3: return body(static_cast<const e4m3*>(p));
    case DType::e5m2: return body(static_cast<const e5m2*>(p));
  }
}

inline const char* at(const void* p, DType type, int64_t i) {
  return static_cast<const char*>(p) + i * size_of(type);
}
inline char* at(void* p, DType type, int64_t i) {
  return static_cast<char*>(p) + i * size_of(type);
}

void load_any(float* out, const void* x, DType type, int64_t n, float scale) {
  with_type(type, x, [&](auto* p) { load(out, p, n, scale); });
}

template <class T>
T* mutable_pointer(const T* p) {
  return const_cast<T*>(p);
}

void store_any(void* out, DType type, const float* x, int64_t n, float inverse_scale) {
  with_type(type, out, [&](auto* p) { store(mutable_pointer(p), x, n, inverse_scale); });
}

void store_divided_any(void* out, DType type, const float* x, int64_t n, float scale) {
  with_type(type, out, [&](auto* p) { store_divided(mutable_pointer(p), x, n, scale); });
}

// The magnitude's bits order like the magnitudes, with every NaN above infinity.
template <class Bits, class T>
Bits amax_code(const T* x, int64_t n) {
  constexpr Bits mask = static_cast<Bits>(~Bits(0)) >> 1;
  Bits result = 0;
  _Pragma("omp simd reduction(max : result)") for (int64_t i = 0; i < n; ++i) {
    const Bits code = bit_cast<Bits>(x[i]) & mask;
    result = result < code ? code : result;
  }
  return result;
}

uint32_t amax(const void* x, DType type, int64_t n) {
  float result = 0.0f;
  switch (type) {
    case DType::f32: return amax_code<uint32_t>(static_cast<const float*>(x), n);
    case DType::f16:
      result = decode(f16{amax_code<uint16_t>(static_cast<const f16*>(x), n)});
      break;
    case DType::bf16:
      result = decode(bf16{amax_code<uint16_t>(static_cast<const bf16*>(x), n)});
      break;
    case DType::e4m3:
      result = decode(e4m3{amax_code<uint8_t>(static_cast<const e4m3*>(x), n)});
      break;
    case DType::e5m2:
      result = decode(e5m2{amax_code<uint8_t>(static_cast<const e5m2*>(x), n)});
      break;
  }
  return bit_cast<uint32_t>(result);
}

void cast(void* out, DType out_type, const void* x, DType type, int64_t n, float factor,
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

void cast_stochastic(void* out, DType out_type, const void* x, DType type, int64_t n, float scale,
                     uint64_t seed, uint64_t first) {
  alignas(64) float buffer[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    load_any(buffer, at(x, type, i), type, m, 1.0f);
    const uint64_t index = first + static_cast<uint64_t>(i);
    auto run = [&](auto* p) {
      QUAVER_SIMD
      for (int64_t j = 0; j < m; ++j) {
        const uint32_t random = random_bits(seed, index + static_cast<uint64_t>(j));
        p[j] = encode_stochastic<std::remove_reference_t<decltype(*p)>>(buffer[j] / scale, random);
      }
    };
    if (out_type == DType::e4m3)
      run(reinterpret_cast<e4m3*>(at(out, out_type, i)));
    else if (out_type == DType::e5m2)
      run(reinterpret_cast<e5m2*>(at(out, out_type, i)));
    else
      run(reinterpret_cast<f16*>(at(out, out_type, i)));
  }
}

// 8 x 8 bytes by three rounds of swaps of 1, 2 and 4 bytes between rows 1, 2 and 4 apart.
inline void transpose8(uint64_t r[8]) {
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
}

void transpose(uint8_t* out, int64_t out_stride, const uint8_t* x, int64_t stride, int64_t rows,
               int64_t cols) {
  uint64_t r[8];
  int64_t row = 0;
  for (; row + 8 <= rows; row += 8) {
    int64_t col = 0;
    for (; col + 8 <= cols; col += 8) {
      for (int i = 0; i < 8; ++i) memcpy(&r[i], x + (row + i) * stride + col, 8);
      transpose8(r);
      for (int i = 0; i < 8; ++i) memcpy(out + (col + i) * out_stride + row, &r[i], 8);
    }
    for (; col < cols; ++col)
      for (int i = 0; i < 8; ++i) out[col * out_stride + row + i] = x[(row + i) * stride + col];
  }
  for (; row < rows; ++row)
    for (int64_t col = 0; col < cols; ++col) out[col * out_stride + row] = x[row * stride + col];
}

double sum_squares(const void* x, DType type, int64_t n, uint32_t* amax_bits) {
  constexpr int group = 16, groups = kNormLanes / group;
  static_assert(kNormLanes == kBlock, "a lane is a place in the buffer");
  alignas(64) double lanes[kNormLanes] = {};
  alignas(64) float buffer[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    load_any(buffer, at(x, type, i), type, m, 1.0f);
    QUAVER_SIMD
    for (int64_t j = 0; j < m; ++j) {
      const double v = buffer[j];
      lanes[j] += v * v;
    }
  }
  *amax_bits = amax(x, type, n);
  double sums[groups];
  for (int g = 0; g < groups; ++g) {
    sums[g] = 0.0;
    for (int k = 0; k < group; ++k) sums[g] += lanes[g * group + k];
  }
  for (int half = groups / 2; half > 0; half /= 2)
    for (int g = 0; g < half; ++g) sums[g] += sums[g + half];
  return sums[0];
}

uint32_t add(void* out, DType out_type, float scale, const void* a, DType a_type, float scale_a,
             const void* b, DType b_type, float scale_b, int64_t n) {
  alignas(64) float sum[kBlock], other[kBlock];
  uint32_t result = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    load_any(sum, at(a, a_type, i), a_type, m, scale_a);
    load_any(other, at(b, b_type, i), b_type, m, scale_b);
    QUAVER_SIMD
    for (int64_t j = 0; j < m; ++j) sum[j] += other[j];
    if (out != nullptr) store_any(at(out, out_type, i), out_type, sum, m, 1.0f / scale);
    const uint32_t block = amax_code<uint32_t>(sum, m);
    result = result < block ? block : result;
  }
  return result;
}

void adam(const AdamSpan& p, const AdamStep& step, int64_t n, uint32_t amax_bits[3]) {
  alignas(64) float w[kBlock], m[kBlock], v[kBlock], g[kBlock];
  const float inverse_w = 1.0f / p.new_weight_scale;
  const float inverse_m = 1.0f / p.new_exp_avg_scale;
  const float inverse_v = 1.0f / p.new_exp_avg_sq_scale;
  const AdamStep s = step;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = n - i < kBlock ? n - i : kBlock;
    load_any(w, at(p.weight, p.weight_type, i), p.weight_type, count, p.weight_scale);
    load_any(m, at(p.exp_avg, p.exp_avg_type, i), p.exp_avg_type, count, p.exp_avg_scale);
    load_any(v, at(p.exp_avg_sq, p.exp_avg_sq_type, i), p.exp_avg_sq_type, count,
             p.exp_avg_sq_scale);
    load_any(g, at(p.grad, p.grad_type, i), p.grad_type, count, p.grad_scale);
    QUAVER_SIMD
    for (int64_t j = 0; j < count; ++j) {
      const AdamElement e = adamw(s, {w[j], m[j], v[j]}, g[j]);
      w[j] = e.weight;
      m[j] = e.exp_avg;
      v[j] = e.exp_avg_sq;
    }
    store_any(at(p.weight, p.weight_type, i), p.weight_type, w, count, inverse_w);
    store_any(at(p.exp_avg, p.exp_avg_type, i), p.exp_avg_type, m, count, inverse_m);
    store_any(at(p.exp_avg_sq, p.exp_avg_sq_type, i), p.exp_avg_sq_type, v, count, inverse_v);
    const float* moments[3] = {w, m, v};
    for (int k = 0; k < 3; ++k) {
      const uint32_t block = amax_code<uint32_t>(moments[k], count);
      amax_bits[k] = amax_bits[k] < block ? block : amax_bits[k];
    }
    if (p.fp8 != nullptr) {  // from the stored codes, so that a reload gives the same copy
      load_any(w, at(p.weight, p.weight_type, i), p.weight_type, count, 1.0f / kMasterToFp8);
      store_any(p.fp8 + i, DType::e4m3, w, count, 1.0f);
    }
  }
}

}  // namespace

extern const Simd table;
const Simd table = {amax, cast, cast_stochastic, transpose, sum_squares, add, adam};

}  // namespace quaver::cpu::QUAVER_ISA
