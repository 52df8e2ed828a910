// AdamW with moments of 4 bits (Li, Chen & Zhu, arXiv 2309.01507, algorithm 1). The first moment is
// in dynamic codes with a scale for each 128 flat elements. The second has one of three forms,
// which differ in when their scales are known.
#pragma once

#include "quaver/adam.h"
#include "quaver/codec4.h"
#include "quaver/dither.h"
#include "quaver/tensor_view.h"

namespace quaver {

// block: linear codes with a scale for each 128 flat elements, chosen within the pass.
// rank1: linear codes; the scale of an element is the least of the maxima of its row and column, or
//     of its slice along every axis, which takes a pass before.
// factor: no codes; the product of a row's and a column's number, which the caller has updated.
enum class Second : int8_t { block, rank1, factor };

constexpr int kMaxAxes = 8;

// The axes of a tensor.
struct Shape {
  int64_t size[kMaxAxes] = {};
  int axes = 0;
};

QUAVER_HD int64_t columns_of(const Shape& shape) {
  return shape.axes > 0 ? shape.size[shape.axes - 1] : 1;
}

// The numbers of a second moment's scales: those of axis 0 first.
inline int64_t second_scale_count(Second second, const Shape& shape, int64_t numel) {
  if (second == Second::block) return group_count(numel);
  int64_t sum = 0;
  for (int k = 0; k < shape.axes; ++k) sum += shape.size[k];
  if (second == Second::rank1) return sum;
  const int64_t rows = shape.axes > 1 ? shape.size[shape.axes - 2] : 1;
  const int64_t columns = columns_of(shape);
  return numel == 0 ? 0 : numel / columns + numel / rows;
}

// The place of the last axis among the numbers.
QUAVER_HD int64_t column_slots(const Shape& shape) {
  int64_t first = 0;
  for (int k = 0; k + 1 < shape.axes; ++k) first += shape.size[k];
  return first;
}

// Calls body(place among the numbers) for each slice that holds a row, a row being flat over all
// axes but the last.
template <class Body>
QUAVER_HD void for_slices(const Shape& shape, int64_t row, Body body) {
  int64_t first = column_slots(shape);
  for (int k = shape.axes - 2; k >= 0; --k) {
    first -= shape.size[k];
    body(first + row % shape.size[k]);
    row /= shape.size[k];
  }
}

// The least of the maxima of a row's slices.
QUAVER_HD float row_scale(const Shape& shape, const float* maxima, int64_t row) {
  float least = bit_cast<float>(0x7f800000u);
  for_slices(shape, row,
             [&](int64_t slot) { least = maxima[slot] < least ? maxima[slot] : least; });
  return least;
}

QUAVER_HD float least_of(float row, float column) { return column < row ? column : row; }

// The factored second moment of row `row`: the row's number, and the first of its columns'.
QUAVER_HD const float* factor_columns(const Shape& shape, const float* factors, int64_t rows,
                                      int64_t row) {
  const int64_t each = shape.axes > 1 ? shape.size[shape.axes - 2] : 1;
  return factors + rows + row / each * columns_of(shape);
}

struct Adam4Parameter {
  TensorView weight, grad;
  const float* grad_scale = nullptr;  // null: 1
  const float* grad_amax = nullptr;   // of the decoded gradient; non-finite skips the whole step
  uint8_t* exp_avg = nullptr;         // codes
  float* exp_avg_scale = nullptr;     // of each 128 flat elements
  uint8_t* exp_avg_sq = nullptr;      // codes; null of a factored one
  float* exp_avg_sq_scale = nullptr;  // second_scale_count numbers
  Second second = Second::block;
  Shape shape;
  Remainder remainder;      // the low bits of a bf16 weight's f32 master (codec.h)
  bool stochastic = false;  // round a 16-bit weight by dither.h, from seed, step, element
  uint64_t seed = 0;
  int64_t* step = nullptr;        // counts the steps taken, 0 <= *step < 2^63 - 1
  const double* hyper = nullptr;  // lr, beta1, beta2, eps, weight_decay
};

namespace cpu {

// If any grad_amax is not finite nothing changes but *skipped, which counts up.
void adam4(const Adam4Parameter* parameters, int64_t count, int64_t* skipped);

}  // namespace cpu

namespace cuda {

// Device memory, 16-byte aligned, that one call needs while it runs.
int64_t adam4_workspace_bytes(const Adam4Parameter* parameters, int64_t count);

// The CPU's step on the device; a captured graph stays right.
void adam4(const Adam4Parameter* parameters, int64_t count, int64_t* skipped, void* workspace,
           void* stream);

}  // namespace cuda
}  // namespace quaver
