#include "quaver/activate.h"

#include "../arguments.h"
#include "../check_cast_layouts.h"
#include "cast_both.h"
#include "simd_activation.h"
#include "squares.h"

namespace quaver::cpu {
namespace {

// Columns of a strip at once: rows are then read in runs that the hardware prefetches, and the
// codes stay in the second-level cache until they are transposed.
constexpr int64_t kColumns = 16 * kBlock;

// A value's place.
const char* value_at(const RowsView& x, int64_t row, int64_t col) {
  return at(x, row * x.pitch + col);
}

// A row's place from a column on, where a group begins.
SavedRow saved_row(const GroupedView& to, int64_t row, int64_t col) {
  if (to.codes.data == nullptr) return {};
  const int64_t cols = to.codes.cols;
  return {to.codes.as<uint8_t>() + row * cols + col,
          to.scale + row * blocks_in_row(cols, to.layout.block) + col / to.layout.block,
          to.layout.block};
}

GroupedRow row_of(const GroupedView& x, int64_t row) {
  if (x.codes.data == nullptr) return {};
  return {x.codes.as<const uint8_t>() + row * x.codes.cols,
          x.scale + row * blocks_in_row(x.codes.cols, x.layout.block), x.layout.block};
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
              float* channel_amax, const RowsView& x, const RowsView& up,
              const float* channel_scale, Activation kind) {
  check_activate(y, x_saved, up_saved, x, up);
  const ActivationSimd& loops = activation_simd();
  if (channel_scale != nullptr) std::fill(channel_amax, channel_amax + x.cols, 0.0f);
  // Groups that fit into a run of columns are saved with it, others a row at a time.
  const bool fits = kBlock % x_saved.layout.block == 0;
  const bool gated = up.data != nullptr;
  cast_both(&y, 1, x.rows, x.cols, [&](const Strip& s, bool first, Sink& sink) {
    alignas(64) float values[kBlock];
    alignas(64) uint32_t channels[kColumns];
    for (int64_t begin = 0; begin < x.cols; begin += kColumns) {
      const int64_t end = std::min(begin + kColumns, x.cols);
      std::fill(channels, channels + (end - begin), 0u);
      for (int64_t row = s.row; row < s.row + s.rows; ++row) {
        if (first && !fits && begin == 0) {
          loops.save_groups(saved_row(x_saved, row, 0), value_at(x, row, 0), x.dtype, x.cols);
          if (gated)
            loops.save_groups(saved_row(up_saved, row, 0), value_at(up, row, 0), x.dtype, x.cols);
        }
        for (int64_t col = begin; col < end; col += kBlock) {
          const int64_t n = std::min(kBlock, end - col);
          SavedRow x_to = {}, up_to = {};
          if (first && fits) {
            x_to = saved_row(x_saved, row, col);
            up_to = saved_row(up_saved, row, col);
          }
          loops.activate(values, value_at(x, row, col), gated ? value_at(up, row, col) : nullptr,
                         x.dtype, n, kind, x_to, up_to);
          if (channel_scale != nullptr)
            loops.scale_channels(values, channels + (col - begin), channel_scale + col, n);
          sink.put(0, row, col, n, values);
        }
      }
      if (first && channel_scale != nullptr)
        add_channels(channel_amax + begin, channels, end - begin);
      sink.finish(s, begin, end - begin);
    }
  });
}

void activate_backward(const GemmCast& dx, const GemmCast& dup, const TensorView& dy,
                       const GroupedView& x, const GroupedView& up, const float* channel_scale,
                       Activation kind) {
  check_activate_backward(dx, dup, dy, x, up);
  const bool gated = up.codes.data != nullptr, joint = is_joint(dup, up);
  const GemmCast outputs[kMaxOutputs] = {dx, dup};
  const int count = gated && !joint ? 2 : 1;
  const int64_t width = joint ? 2 * dy.cols : dy.cols;
  cast_both(outputs, count, dy.rows, width, [&](const Strip& s, bool, Sink& sink) {
    alignas(64) float values[kMaxOutputs][kBlock];
    for (int64_t begin = 0; begin < dy.cols; begin += kColumns) {
      const int64_t end = std::min(begin + kColumns, dy.cols);
      for (int64_t row = s.row; row < s.row + s.rows; ++row) {
        for (int64_t col = begin; col < end; col += kBlock) {
          const int64_t n = std::min(kBlock, end - col);
          activation_simd().activate_backward(values[0], values[1], at(dy, row * dy.cols), dy.dtype,
                                              row_of(x, row), row_of(up, row), channel_scale, col,
                                              n, kind);
          for (int k = 0; k < count; ++k) sink.put(k, row, col, n, values[k]);
          if (joint) sink.put(0, row, dy.cols + col, n, values[1]);
        }
      }
      sink.finish(s, begin, end - begin);
      if (joint) sink.finish(s, dy.cols + begin, end - begin);
    }
  });
}

void activate_layouts(const LayoutsCast& y, const GroupedView& x_saved, const GroupedView& up_saved,
                      float* channel_amax, const RowsView& x, const RowsView& up,
                      const float* channel_scale, Activation kind) {
  check_activate_inputs("activate_layouts", x_saved, up_saved, x, up);
  check_blocks("activate_layouts", y, x.rows, x.cols);
  clear_layouts(y, x.rows, x.cols);
  const ActivationSimd& loops = activation_simd();
  if (channel_scale != nullptr) std::fill(channel_amax, channel_amax + x.cols, 0.0f);
  // Groups that fit into a square are saved with it, others by the square that begins their row.
  const bool fits = kScaleTile % x_saved.layout.block == 0;
  const bool gated = up.data != nullptr;
  for_squares(x, [&](const Square& s) {
    SquareBuffer buffer;
    alignas(64) uint32_t channels[kScaleTile] = {};
    for (int64_t r = 0; r < s.x.rows; ++r) {
      const int64_t row = s.row + r;
      const char *from = value_at(x, row, s.col),
                 *up_from = gated ? value_at(up, row, s.col) : nullptr;
      SavedRow x_to = {}, up_to = {};
      if (fits) {
        x_to = saved_row(x_saved, row, s.col);
        up_to = saved_row(up_saved, row, s.col);
      } else if (s.col == 0) {
        loops.save_groups(saved_row(x_saved, row, 0), from, x.dtype, x.cols);
        if (gated) loops.save_groups(saved_row(up_saved, row, 0), up_from, x.dtype, x.cols);
      }
      loops.activate(buffer.row(r), from, up_from, x.dtype, s.x.cols, kind, x_to, up_to);
      if (channel_scale != nullptr)
        loops.scale_channels(buffer.row(r), channels, channel_scale + s.col, s.x.cols);
    }
    if (channel_scale != nullptr) add_channels(channel_amax + s.col, channels, s.x.cols);
    cast_square(y, buffer.at(s));
  });
}

void activate_backward_layouts(const LayoutsCast& dx, const LayoutsCast& dup, const TensorView& dy,
                               const GroupedView& x, const GroupedView& up,
                               const float* channel_scale, Activation kind) {
  const char* op = "activate_backward_layouts";
  const bool gated = up.codes.data != nullptr;
  check_gradient_inputs(op, dy, x, up);
  check_blocks(op, dx, dy.rows, dy.cols);
  clear_layouts(dx, dy.rows, dy.cols);
  if (gated) {
    check_blocks(op, dup, dy.rows, dy.cols);
    clear_layouts(dup, dy.rows, dy.cols);
  }
  for_squares(dy, [&](const Square& s) {
    SquareBuffer of_x, of_up;
    for (int64_t r = 0; r < s.x.rows; ++r) {
      const int64_t row = s.row + r;
      activation_simd().activate_backward(of_x.row(r), of_up.row(r), at(dy, row * dy.cols),
                                          dy.dtype, row_of(x, row), row_of(up, row), channel_scale,
                                          s.col, s.x.cols, kind);
    }
    cast_square(dx, of_x.at(s));
    if (gated) cast_square(dup, of_up.at(s));
  });
}

}  // namespace quaver::cpu
