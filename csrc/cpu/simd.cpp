// The vector loops, compiled once per instruction set (QUAVER_ISA = portable, avx2, avx512). They
// are plain C++ over the arithmetic of include/quaver, written so that the compiler vectorises
// them; span.h has the conversions that they share. Tests compare the bits of all instruction sets.
#include "simd.h"

#include "quaver/grad.h"
#include "simd_adam.h"
#include "simd_philox.h"
#include "simd_subset.h"
#include "span.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

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
  alignas(64) uint32_t random[kBlock + kDrawn];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    load_any(buffer, at(x, type, i), type, m, 1.0f);
    const uint64_t index = first + static_cast<uint64_t>(i);
    const int64_t inside = index % 4;  // its block
    random_words(random, seed, index - static_cast<uint64_t>(inside), 0, m + inside);
    auto run = [&](auto* p) {
      QUAVER_SIMD
      for (int64_t j = 0; j < m; ++j)
        p[j] = encode_stochastic<std::remove_reference_t<decltype(*p)>>(buffer[j] / scale,
                                                                        random[inside + j]);
    };
    if (out_type == DType::e4m3)
      run(reinterpret_cast<e4m3*>(at(out, out_type, i)));
    else if (out_type == DType::e5m2)
      run(reinterpret_cast<e5m2*>(at(out, out_type, i)));
    else
      run(reinterpret_cast<f16*>(at(out, out_type, i)));
  }
}

// A square of bytes, kSquare on a side, transposed in registers.
#if defined(__SSE2__)
constexpr int64_t kSquare = 16;

// Each round interleaves the rows of the two halves; four rounds turn rows into columns.
inline void transpose_square(uint8_t* out, int64_t out_stride, const uint8_t* x, int64_t stride) {
  __m128i r[16], t[16];
  for (int i = 0; i < 16; ++i)
    r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i * stride));
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm_unpacklo_epi8(r[i], r[i + 8]);
      t[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[i + 8]);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }
  for (int i = 0; i < 16; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * out_stride), r[i]);
}
#else
constexpr int64_t kSquare = 8;

// Three rounds of swaps of 1, 2 and 4 bytes between rows that are 1, 2 and 4 apart.
inline void transpose_square(uint8_t* out, int64_t out_stride, const uint8_t* x, int64_t stride) {
  uint64_t r[8];
  for (int i = 0; i < 8; ++i) memcpy(&r[i], x + i * stride, 8);
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
  for (int i = 0; i < 8; ++i) memcpy(out + i * out_stride, &r[i], 8);
}
#endif

void transpose(uint8_t* out, int64_t out_stride, const uint8_t* x, int64_t stride, int64_t rows,
               int64_t cols) {
  const int64_t square_rows = rows - rows % kSquare, square_cols = cols - cols % kSquare;
  // The outer loop is over columns, so that a run of `out` rows is written from end to end.
  for (int64_t col = 0; col < square_cols; col += kSquare)
    for (int64_t row = 0; row < square_rows; row += kSquare)
      transpose_square(out + col * out_stride + row, out_stride, x + row * stride + col, stride);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t col = row < square_rows ? square_cols : 0; col < cols; ++col)
      out[col * out_stride + row] = x[row * stride + col];
}

double sum_squares(const void* x, DType type, int64_t n, uint32_t* amax_bits) {
  constexpr int group = 16, groups = kNormLanes / group;
  static_assert(kNormLanes == kBlock, "a lane is a place in the buffer");
  alignas(64) double lanes[kNormLanes] = {};
  alignas(64) float buffer[kBlock];
  uint32_t most = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    const float* values = buffer;
    prefetch(at(x, type, i), m * size_of(type));
    if (type == DType::f32)
      values = static_cast<const float*>(x) + i;
    else
      load_any(buffer, at(x, type, i), type, m, 1.0f);
    QUAVER_SIMD
    for (int64_t j = 0; j < m; ++j) {
      const double v = values[j];
      lanes[j] += v * v;
    }
    const uint32_t seen = amax_code<uint32_t>(values, m);  // while they are in the nearest cache
    most = most < seen ? seen : most;
  }
  *amax_bits = most;
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

}  // namespace

extern const Simd table;
const Simd table = {amax, cast,          cast_stochastic, transpose,   sum_squares,
                    add,  encode_groups, decode_groups,   subset_sums, adam};

}  // namespace quaver::cpu::QUAVER_ISA
