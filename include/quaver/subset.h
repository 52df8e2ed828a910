// Stage "optimizer": sums of squared gradients over subsets of a parameter's elements (Subset-Norm,
// arXiv 2411.07120, section 3), with the amaxes that a step must see first, in one read.
#pragma once

#include "quaver/grad.h"
#include "quaver/math.h"

namespace quaver {

// Which elements share a value of a second moment: `width` that follow each other or, `strided`,
// every width-th. Of a matrix [R, C] width C is one value for each row, and strided one for each
// column. Width 0: each element has its own.
struct Subsets {
  int64_t width = 0;
  bool strided = false;
};

QUAVER_HD int64_t subset_count(const Subsets& s, int64_t elements) {
  if (s.width == 0) return 0;
  return s.strided ? s.width : elements / s.width + (elements % s.width != 0);
}

// The order of an f32 sum, which depends on shapes only and is the same on every device. A subset
// is cut into pieces, which are added in order. A strided piece is summed in order. In one of
// consecutive elements element i goes to lane i % kSubsetLanes, and the lanes are added in a tree:
// the upper half to the lower one until one is left.
constexpr int64_t kSubsetLanes = 32;
constexpr int64_t kSubsetPiece = 1 << 14;
constexpr int64_t kStridedPiece = 128;  // short, so that narrow matrices occupy a GPU too

struct SubsetGrad {
  ScaledView grad;
  Subsets subsets;
  float* sums = nullptr;  // subset_count of them, null for none
};

namespace cpu {

// sums = sums of squares of scale * value over each subset of each gradient. amax[i] = the largest
// |scale * value| of gradient i, or NaN where its scale or the amax that it carries is not finite.
void subset_sums(float* amax, const SubsetGrad* grads, int64_t count);

}  // namespace cpu

namespace cuda {

// The same, on the device; `workspace` is device memory, 16-byte aligned.
int64_t subset_sums_workspace_bytes(const SubsetGrad* grads, int64_t count);
void subset_sums(float* amax, const SubsetGrad* grads, int64_t count, void* workspace,
                 void* stream);

}  // namespace cuda
}  // namespace quaver
