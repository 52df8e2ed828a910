// Stage "activate": the nonlinearity of an MLP, cast to FP8 as it is computed.
//
//   v = f(x) * up, or f(x) without `up` (SwiGLU and GeGLU, arXiv 2002.05202);  y = v *
//   channel_scale
//
// in f32 and in this order. channel_scale [C] is Smooth-SwiGLU's (arXiv 2409.12517, section 4.4).
// Backward, with g = dy * channel_scale:  dx = g * up * f'(x),  dup = g * f(x).
#pragma once

#include "quaver/activation.h"
#include "quaver/cast_layouts.h"

namespace quaver {
namespace cpu {

// y, and saved copies of x and up, all of [R, C]. `up` and channel_scale may be without data; then
// up_saved is not written. channel_amax [C] f32, with a channel_scale: the largest |v| of a column.
void activate(const GemmCast& y, const GroupedView& x_saved, const GroupedView& up_saved,
              float* channel_amax, const RowsView& x, const RowsView& up,
              const float* channel_scale, Activation kind);

// dx and dup (none without up) from dy [R, C] and the saved copies. With an up and no dup, dx is
// [dx, dup] of [R, 2 C], by one scale; C is then a multiple of 16.
void activate_backward(const GemmCast& dx, const GemmCast& dup, const TensorView& dy,
                       const GroupedView& x, const GroupedView& up, const float* channel_scale,
                       Activation kind);

// The same with results in 1 x 128 blocks; their grain is block. dup without codes: none.
void activate_layouts(const LayoutsCast& y, const GroupedView& x_saved, const GroupedView& up_saved,
                      float* channel_amax, const RowsView& x, const RowsView& up,
                      const float* channel_scale, Activation kind);
void activate_backward_layouts(const LayoutsCast& dx, const LayoutsCast& dup, const TensorView& dy,
                               const GroupedView& x, const GroupedView& up,
                               const float* channel_scale, Activation kind);

}  // namespace cpu

// The same functions on the device, in `stream` (a cudaStream_t).
namespace cuda {

void activate(const GemmCast& y, const GroupedView& x_saved, const GroupedView& up_saved,
              float* channel_amax, const RowsView& x, const RowsView& up,
              const float* channel_scale, Activation kind, void* stream);
void activate_backward(const GemmCast& dx, const GemmCast& dup, const TensorView& dy,
                       const GroupedView& x, const GroupedView& up, const float* channel_scale,
                       Activation kind, void* stream);
void activate_layouts(const LayoutsCast& y, const GroupedView& x_saved, const GroupedView& up_saved,
                      float* channel_amax, const RowsView& x, const RowsView& up,
                      const float* channel_scale, Activation kind, void* stream);
void activate_backward_layouts(const LayoutsCast& dx, const LayoutsCast& dup, const TensorView& dy,
                               const GroupedView& x, const GroupedView& up,
                               const float* channel_scale, Activation kind, void* stream);

}  // namespace cuda
}  // namespace quaver
