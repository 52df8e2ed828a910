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

// out = scale_a * scale_b * a @ b.T + bias, as the op gemm_ writes it.
void multiply_into(const Tensor& out, const Tensor& a, const Tensor& scale_a, const Tensor& b,
                   const Tensor& scale_b, const OptionalTensor& bias, bool fast_accumulate);

// Throws where multiply_into would.
void check_product(const Tensor& out, const Tensor& a, const Tensor& scale_a, const Tensor& b,
                   const Tensor& scale_b, const OptionalTensor& bias, bool fast_accumulate);

// a * b by torch, broadcast.
Tensor multiply(const Tensor& a, const Tensor& b);

}  // namespace quaver::binding
