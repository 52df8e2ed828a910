// Stage "normalize": RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450), cast to FP8 as
// they are computed.
//
//   y = (x - mean) * rstd * weight + bias,  rstd = 1 / sqrt(mean((x - mean)^2) + eps)
//
// in f32 and in this order; RMSNorm has mean 0. Backward, with xhat = (x - mean) * rstd and
// g = dy * weight:
//
//   dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd,  dweight = sum(dy * xhat),  dbias = sum(dy)
//
// where mean(g) is for LayerNorm only. Sums have one order on every device, which depends on shapes
// alone. Over a row: element i goes to lane i % kRowLanes, in order, and the lanes are added in a
// tree. Over the rows of a column: rows go in pieces of kRowPiece, in order; piece p goes to strand
// p % kRowStrands, in order, and the strands are added in a tree. (A tree adds its upper half to
// its lower one until one is left.)
#pragma once

#include <cmath>

#include "quaver/cast_layouts.h"

namespace quaver {

constexpr int kRowLanes = 512;
constexpr int64_t kRowPiece = 64;
constexpr int kRowStrands = 16;

// A sum that is not finite makes rstd NaN, so that its row is NaN and not zeros.
QUAVER_HD float inverse_deviation(float mean_square, float eps) {
  return is_finite(mean_square) ? 1.0f / ::sqrtf(mean_square + eps) : bit_cast<float>(0x7fc00000u);
}

QUAVER_HD float normalized(float x, float mean, float rstd) { return (x - mean) * rstd; }

struct NormalizeGradient {
  float mean_g, mean_g_xhat;  // over the row
};

QUAVER_HD float normalize_gradient(float g, float xhat, const NormalizeGradient& row, float rstd) {
  return (g - row.mean_g - xhat * row.mean_g_xhat) * rstd;
}

inline int64_t row_pieces(int64_t rows) { return (rows + kRowPiece - 1) / kRowPiece; }

namespace cpu {

// y and the saved copy of x [R, C]. mean [R] f32, null for RMSNorm; rstd [R] f32. weight and bias
// [C] f32, f16 or bf16, or without data.
void normalize(const GemmCast& y, const GroupedView& saved, float* mean, float* rstd,
               const TensorView& x, const TensorView& weight, const TensorView& bias, float eps);

// The same with y in 1 x 128 blocks; y.grain is block.
void normalize_layouts(const LayoutsCast& y, const GroupedView& saved, float* mean, float* rstd,
                       const TensorView& x, const TensorView& weight, const TensorView& bias,
                       float eps);

// dx [R, C]; dweight and dbias [C] f32, null where not wanted. dy [R, C].
void normalize_backward(const TensorView& dx, float* dweight, float* dbias, const TensorView& dy,
                        const GroupedView& x, const float* mean, const float* rstd,
                        const TensorView& weight);

}  // namespace cpu

// The same on the device, in `stream` (a cudaStream_t).
namespace cuda {

void normalize(const GemmCast& y, const GroupedView& saved, float* mean, float* rstd,
               const TensorView& x, const TensorView& weight, const TensorView& bias, float eps,
               void* stream);
void normalize_layouts(const LayoutsCast& y, const GroupedView& saved, float* mean, float* rstd,
                       const TensorView& x, const TensorView& weight, const TensorView& bias,
                       float eps, void* stream);

int64_t normalize_backward_workspace_bytes(int64_t rows, int64_t cols);
void normalize_backward(const TensorView& dx, float* dweight, float* dbias, const TensorView& dy,
                        const GroupedView& x, const float* mean, const float* rstd,
                        const TensorView& weight, void* workspace, void* stream);

}  // namespace cuda
}  // namespace quaver
