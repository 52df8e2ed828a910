// What linear.cpp composes of other stages' bindings.
#pragma once

#include <initializer_list>

#include "device.h"
#include "quaver/quantize.h"

namespace quaver::binding {

// A matrix in FP8 as products read it; qt is its transpose where that was asked for.
struct MatrixCast {
  Tensor q;
  OptionalTensor qt;
  Tensor scale;
};

// A cast whose arguments are checked and whose results are allocated, but not written: an op that
// refuses its other arguments must not have changed the history.
struct PendingCast {
  Tensor x;
  MatrixCast to;
  ScaleSource source;
};

// Of x [R, C] in FP8, padded with zeros to multiples of 16. A scale that is chosen by the cast, in
// time or by the history, is NaN where a value of x is not finite.
PendingCast prepare_cast(const char* op, const Tensor& x, ScalarType dtype, bool both,
                         const OptionalTensor& scale, const OptionalTensor& history);
// Runs those that are not null, on a GPU in the launches of one.
void run_casts(const char* op, std::initializer_list<const PendingCast*> casts);

// q [R, C], scale and amax of a whole tensor's just-in-time cast.
MatrixCast quantize_whole(const char* op, const Tensor& x, ScalarType dtype, Tensor* amax);

// A product: out = scale_a * scale_b * a @ b.T + bias, or + out where it accumulates; FP8 under
// `out_scale`, with an amax, or in a float type.
struct Product {
  Tensor out, a, scale_a, b, scale_b;
  OptionalTensor bias;
  bool accumulate = false, fast_accumulate = true;
  OptionalTensor out_scale = {}, amax = {};
  Layout layout_a = {}, layout_b = {};  // of the scales, by prepare_product
  OptionalTensor strided = {};          // the result, where `out` is dense memory in its place
};

// Checks a product, and makes its tensors dense. Operands that are dense may be written until it
// runs.
Product prepare_product(Product product);
void run_product(Product product);

// a * b by torch, broadcast.
Tensor multiply(const Tensor& a, const Tensor& b);

}  // namespace quaver::binding
