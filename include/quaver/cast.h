// Results of the fused ops: FP8 in both GEMM layouts under one scale, and copies in groups that are
// kept for backward.
#pragma once

#include "quaver/quantize.h"

namespace quaver {

// The GEMM wants both axes in multiples of this; the padding beyond the values is zero.
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

// A matrix that is to be cast as it lies: q and qt have its shape and its transpose's. qt without
// data, amax null: not wanted.
struct MatrixJob {
  GemmCast to;
  TensorView x;
};

namespace cuda {

// Up to two casts of matrices of FP8, in the launches of one where both x have one type.
constexpr int kMostJobs = 2;
void cast_matrices(const MatrixJob* jobs, int count, void* stream);

}  // namespace cuda

// A matrix whose rows may lie apart, as those of the halves of a joint projection do.
struct RowsView : TensorView {
  int64_t pitch = 0;  // elements from each row to the next

  RowsView() = default;
  RowsView(const TensorView& v) : TensorView(v), pitch(v.cols) {}
};

// e4m3 codes [R, C] in groups of 1 x block along the last axis. A group's scale is a power of two
// (scale_from_amax), stored as the byte of OCP MX's e8m0: 2^(byte - 127), 255 is NaN.
struct GroupedView {
  TensorView codes;          // no data: nothing to save
  uint8_t* scale = nullptr;  // [R, layout.scales_in_row(C)]
  Layout layout = {Grain::block, 32};
};

// The scale of a group as its e8m0 byte, from the bits of its amax: scale_from_amax for e4m3 and a
// power of two, by integers alone. The finite maximum is (1 + f) * 2^k, so the exponent is amax's
// less k, and one more where amax's fraction is above f.
QUAVER_HD uint32_t block_exponent(uint32_t amax_bits) {
  using F = Format<e4m3>;
  constexpr uint32_t k = (F::max_code >> F::mantissa) - F::bias;
  constexpr uint32_t fraction = (F::max_code & ((1u << F::mantissa) - 1u)) << (23 - F::mantissa);
  const uint32_t exponent = (amax_bits + (0x7fffffu - fraction)) >> 23;
  const uint32_t chosen = select(exponent > k + 1u, exponent - k, 1u);  // kMinScale
  return select(amax_bits - 1u < 0x7f7fffffu, chosen, 127u);            // 0, Inf and NaN: scale 1
}

// 1 / scale of what block_exponent gives, exactly.
QUAVER_HD float block_inverse(uint32_t code) { return bit_cast<float>((254u - code) << 23); }

QUAVER_HD float decode_e8m0(uint8_t code) {
  const uint32_t bits =
      select(code == 0, 0x00400000u, uint32_t(code) << 23);  // 2^-127 is subnormal
  return bit_cast<float>(select(code == 255, 0x7fc00000u, bits));
}

}  // namespace quaver
