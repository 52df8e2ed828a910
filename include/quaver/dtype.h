// The storage formats and their limits. No other file names a finite maximum.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define QUAVER_HD static __host__ __device__ __forceinline__
#else
// static and always inlined: the same header is compiled for several instruction sets, and the
// linker must never merge an AVX-512 copy of a function into the portable code.
#define QUAVER_HD static inline __attribute__((always_inline))

#endif

namespace quaver {

enum class DType : int8_t { f32, f16, bf16, e4m3, e5m2 };

// Storage types: the bits of one value.
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
struct e4m3 {
  uint8_t bits;
};  // OCP FP8 E4M3 "fn": no infinity, NaN is S.1111.111
struct e5m2 {
  uint8_t bits;
};  // OCP FP8 E5M2: IEEE-like, with infinity

// A binary format of one sign bit, `mantissa` fraction bits and an exponent bias.
template <class T> struct Format;

template <> struct Format<e4m3> {
  using Bits = uint8_t;
  static constexpr int width = 8, mantissa = 3, bias = 7;
  static constexpr uint32_t max_code = 0x7e;       // 448
  static constexpr uint32_t infinity_code = 0x80;  // none
  static constexpr uint32_t nan_code = 0x7f;
  static constexpr float finite_max = 448.0f;
};

template <> struct Format<e5m2> {
  using Bits = uint8_t;
  static constexpr int width = 8, mantissa = 2, bias = 15;
  static constexpr uint32_t max_code = 0x7b;  // 57344
  static constexpr uint32_t infinity_code = 0x7c;
  static constexpr uint32_t nan_code = 0x7f;
  static constexpr float finite_max = 57344.0f;
};

template <> struct Format<f16> {
  using Bits = uint16_t;
  static constexpr int width = 16, mantissa = 10, bias = 15;
  static constexpr uint32_t max_code = 0x7bff;  // 65504
  static constexpr uint32_t infinity_code = 0x7c00;
  static constexpr uint32_t nan_code = 0x7fff;
  static constexpr float finite_max = 65504.0f;
};

template <class T> struct DTypeOf;
template <> struct DTypeOf<float> {
  static constexpr DType value = DType::f32;
};
template <> struct DTypeOf<f16> {
  static constexpr DType value = DType::f16;
};
template <> struct DTypeOf<bf16> {
  static constexpr DType value = DType::bf16;
};
template <> struct DTypeOf<e4m3> {
  static constexpr DType value = DType::e4m3;
};
template <> struct DTypeOf<e5m2> {
  static constexpr DType value = DType::e5m2;
};

constexpr int64_t size_of(DType t) {
  return t == DType::f32 ? 4 : (t == DType::f16 || t == DType::bf16) ? 2 : 1;
}

constexpr bool is_fp8(DType t) { return t == DType::e4m3 || t == DType::e5m2; }

constexpr const char* name_of(DType t) {
  return t == DType::f32    ? "f32"
         : t == DType::f16  ? "f16"
         : t == DType::bf16 ? "bf16"
         : t == DType::e4m3 ? "e4m3"
                            : "e5m2";
}

// The value that a tensor's amax is scaled to; 0 for bf16 and f32, which need no scale. FP8 uses
// its finite maximum. f16 stops at 448 * 2^7 instead of 65504: the scale of a weight's e4m3 copy
// for the GEMM is then exactly 2^7 times the scale of its f16 master, so the copy is a pure
// function of the f16 codes and needs no state, no amax and no second pass.
constexpr float kMasterToFp8 = 128.0f;

constexpr float scale_max(DType t) {
  return t == DType::e4m3   ? Format<e4m3>::finite_max
         : t == DType::e5m2 ? Format<e5m2>::finite_max
         : t == DType::f16  ? Format<e4m3>::finite_max * kMasterToFp8
                            : 0.0f;
}

template <class To, class From>
QUAVER_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// condition ? a : b. Without masked instructions gcc turns ?: into control flow and then does not
// vectorise the loop around it.
QUAVER_HD uint32_t select(bool condition, uint32_t a, uint32_t b) {
#if defined(__AVX512F__) || defined(__CUDACC__)
  return condition ? a : b;
#else
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (a & mask) | (b & ~mask);
#endif
}

}  // namespace quaver
