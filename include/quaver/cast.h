// What the fused ops write: FP8 in both GEMM layouts under one scale, and group-quantised copies to
// keep for backward.
#pragma once

#include "quaver/quantize.h"

namespace quaver {

// The GEMM wants both axes in multiples of this; what is beyond the values is zero.
constexpr int64_t kGemmAlign = 16;

constexpr int64_t gemm_padded(int64_t n) { return (n + kGemmAlign - 1) / kGemmAlign * kGemmAlign; }

// A matrix [R, C] cast like cast_transpose does, padded.
struct GemmCast {
  TensorView q;   // [gemm_padded(R), gemm_padded(C)], e4m3 or e5m2
  TensorView qt;  // its transpose
  float* scale = nullptr;
  float* amax = nullptr;  // of the real values before the encoding
  bool power_of_two = true;
  ScaleSource source;
};

// e4m3 codes [R, C] in groups of 1 x block along the last axis. A group's scale is a power of two
// (scale_from_amax), stored as the byte of OCP MX's e8m0: 2^(byte - 127), 255 is NaN.
struct GroupedView {
  TensorView codes;          // no data: nothing to save
  uint8_t* scale = nullptr;  // [R, groups_in_row]
  int64_t block = 32;
};

constexpr int64_t groups_in_row(int64_t cols, int64_t block) { return (cols + block - 1) / block; }

QUAVER_HD uint8_t encode_e8m0(float scale) {
  return static_cast<uint8_t>(bit_cast<uint32_t>(scale) >> 23);
}

QUAVER_HD float decode_e8m0(uint8_t code) {
  const uint32_t bits =
      select(code == 0, 0x00400000u, uint32_t(code) << 23);  // 2^-127 is subnormal
  return bit_cast<float>(select(code == 255, 0x7fc00000u, bits));
}

}  // namespace quaver
