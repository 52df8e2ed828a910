#include "quaver/activate.h"

#include "../arguments.h"
#include "cast_both.h"
#include "simd_activation.h"

namespace quaver::cpu {
namespace {

// Columns of a row, whole groups but for the last ones of the row.
void save_columns(const GroupedView& to, const TensorView& x, int64_t row, int64_t col, int64_t n) {
  activation_simd().save_groups(to.codes.as<uint8_t>() + row * x.cols + col,
                                to.scale + row * groups_in_row(x.cols, to.block) + col / to.block,
                                at(x, row * x.cols + col), x.dtype, n, to.block);
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
  const int64_t block = x_saved.block;
  // Groups that fit into the columns at hand are saved while those are in the first-level cache.
  const bool fits = kBlock % block == 0;
  cast_both(&y, 1, x.rows, x.cols, [&](const Strip& s, bool first, Sink& sink) {
    alignas(64) float values[kBlock];
    alignas(64) uint32_t channels[kBlock];
    for (int64_t col = 0; col < x.cols; col += kBlock) {
      const int64_t n = std::min(kBlock, x.cols - col);
      const int64_t saved = fits ? n : col == 0 ? x.cols : 0;
      std::fill(channels, channels + n, 0u);
      for (int64_t row = s.row; row < s.row + s.rows; ++row) {
        const int64_t i = row * x.cols + col;
        if (first && saved > 0) {
          save_columns(x_saved, x, row, col, saved);
          if (up.data != nullptr) save_columns(up_saved, up, row, col, saved);
        }
        loops.activate(values, at(x, i), up.data != nullptr ? at(up, i) : nullptr, x.dtype, n,
                       kind);
        if (channel_scale != nullptr)
          loops.scale_channels(values, channels, channel_scale + col, n);
        sink.put(0, row, col, n, values);
      }
      if (first && channel_scale != nullptr) add_channels(channel_amax + col, channels, n);
      sink.finish(s, col, n);
    }
  });
}

void activate_backward(const GemmCast& dx, const GemmCast& dup, const TensorView& dy,
                       const GroupedView& x, const GroupedView& up, const float* channel_scale,
                       Activation kind) {
  check_activate_backward(dx, dup, dy, x, up);
  const bool gated = up.codes.data != nullptr;
  const GemmCast outputs[kMaxOutputs] = {dx, dup};
  cast_both(outputs, gated ? 2 : 1, dy.rows, dy.cols, [&](const Strip& s, bool, Sink& sink) {
    alignas(64) float values[kMaxOutputs][kBlock];
    for (int64_t col = 0; col < dy.cols; col += kBlock) {
      const int64_t n = std::min(kBlock, dy.cols - col);
      for (int64_t row = s.row; row < s.row + s.rows; ++row) {
        activation_simd().activate_backward(values[0], values[1], at(dy, row * dy.cols), dy.dtype,
                                            row_of(x, row), row_of(up, row), channel_scale, col, n,
                                            kind);
        for (int k = 0; k < (gated ? 2 : 1); ++k) sink.put(k, row, col, n, values[k]);
      }
      sink.finish(s, col, n);
    }
  });
}

}  // namespace quaver::cpu
