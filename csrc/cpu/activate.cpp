#include "quaver/activate.h"

#include "../arguments.h"
#include "cast_both.h"
#include "simd_activation.h"

namespace quaver::cpu {
namespace {

void save_row(const GroupedView& to, const TensorView& x, int64_t row) {
  activation_simd().save_groups(to.codes.as<uint8_t>() + row * x.cols,
                                to.scale + row * groups_in_row(x.cols, to.block),
                                at(x, row * x.cols), x.dtype, x.cols, to.block);
}

GroupedRow row_of(const GroupedView& x, int64_t row) {
  if (x.codes.data == nullptr) return {};
  return {x.codes.as<const uint8_t>() + row * x.codes.cols,
          x.scale + row * groups_in_row(x.codes.cols, x.block), x.block};
}

// Columns of several strips at once; a maximum does not depend on their order.
void add_channels(float* amax, const uint32_t* bits, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    auto* to = reinterpret_cast<uint32_t*>(amax + c);
    uint32_t seen = __atomic_load_n(to, __ATOMIC_RELAXED);
    while (seen < bits[c] && !__atomic_compare_exchange_n(to, &seen, bits[c], true,
                                                          __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
}

}  // namespace

void activate(const GemmCast& y, const GroupedView& x_saved, const GroupedView& up_saved,
              float* channel_amax, const TensorView& x, const TensorView& up,
              const float* channel_scale, Activation kind) {
  check_activate(y, x_saved, up_saved, x, up);
  const ActivationSimd& loops = activation_simd();
  if (channel_scale != nullptr) std::fill(channel_amax, channel_amax + x.cols, 0.0f);
  cast_both(&y, 1, x.rows, x.cols, [&](const Block& b, bool first, auto sink) {
    alignas(64) float values[kBlock];
    alignas(64) uint32_t channels[kBlock] = {};
    for (int64_t row = b.row; row < b.row + b.rows; ++row) {
      if (first && b.col == 0) {
        save_row(x_saved, x, row);
        if (up.data != nullptr) save_row(up_saved, up, row);
      }
      const int64_t i = row * x.cols + b.col;
      loops.activate(values, at(x, i), up.data != nullptr ? at(up, i) : nullptr, x.dtype, b.cols,
                     kind);
      if (channel_scale != nullptr)
        loops.scale_channels(values, channels, channel_scale + b.col, b.cols);
      sink(0, row, values);
    }
    if (first && channel_scale != nullptr) add_channels(channel_amax + b.col, channels, b.cols);
  });
}

void activate_backward(const GemmCast& dx, const GemmCast& dup, const TensorView& dy,
                       const GroupedView& x, const GroupedView& up, const float* channel_scale,
                       Activation kind) {
  check_activate_backward(dx, dup, dy, x, up);
  const bool gated = up.codes.data != nullptr;
  const GemmCast outputs[kMaxOutputs] = {dx, dup};
  cast_both(outputs, gated ? 2 : 1, dy.rows, dy.cols, [&](const Block& b, bool, auto sink) {
    alignas(64) float values[kMaxOutputs][kBlock];
    for (int64_t row = b.row; row < b.row + b.rows; ++row) {
      activation_simd().activate_backward(values[0], values[1], at(dy, row * dy.cols), dy.dtype,
                                          row_of(x, row), row_of(up, row), channel_scale, b.col,
                                          b.cols, kind);
      for (int k = 0; k < (gated ? 2 : 1); ++k) sink(k, row, values[k]);
    }
  });
}

}  // namespace quaver::cpu
