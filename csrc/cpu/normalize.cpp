#include "quaver/normalize.h"

#include <vector>

#include "../arguments.h"
#include "../check_cast_layouts.h"
#include "cast_both.h"
#include "simd_activation.h"
#include "squares.h"

namespace quaver::cpu {
namespace {

// An optional [C] argument as f32, converted once because every row reads it.
class Channels {
 public:
  explicit Channels(const TensorView& v) : values_(v.data != nullptr ? v.numel() : 0) {
    if (v.data == nullptr) return;
    simd().cast(values_.data(), DType::f32, v.data, v.dtype, v.numel(), 1.0f, false);
    given_ = true;
  }
  const float* from(int64_t col) const { return given_ ? values_.data() + col : nullptr; }

 private:
  std::vector<float> values_;
  bool given_ = false;
};

struct Statistics {
  float mean, rstd;
};

Statistics statistics(const TensorView& x, int64_t row, bool centered, float eps) {
  const char* values = at(x, row * x.cols);
  const float count = static_cast<float>(std::max<int64_t>(x.cols, 1));
  const float mean =
      centered ? activation_simd().row_sum(values, x.dtype, x.cols, 0.0f, false) / count : 0.0f;
  const float squares = activation_simd().row_sum(values, x.dtype, x.cols, mean, true);
  return {mean, inverse_deviation(squares / count, eps)};
}

// The statistics of each row and its saved copy.
class Rows {
 public:
  Rows(const GroupedView& saved, float* mean, float* rstd, const TensorView& x, float eps)
      : saved_(saved), mean_(mean), rstd_(rstd), x_(x), eps_(eps) {}

  void measure(int64_t row) const {
    const Statistics of = statistics(x_, row, mean_ != nullptr, eps_);
    if (mean_ != nullptr) mean_[row] = of.mean;
    rstd_[row] = of.rstd;
    const int64_t groups = blocks_in_row(x_.cols, saved_.layout.block);
    activation_simd().save_groups({saved_.codes.as<uint8_t>() + row * x_.cols,
                                   saved_.scale + row * groups, saved_.layout.block},
                                  at(x_, row * x_.cols), x_.dtype, x_.cols);
  }

  void normalize(float* out, int64_t row, int64_t col, int64_t n, const Channels& weights,
                 const Channels& biases) const {
    activation_simd().normalize(out, at(x_, row * x_.cols + col), x_.dtype, n,
                                mean_ != nullptr ? mean_[row] : 0.0f, rstd_[row], weights.from(col),
                                biases.from(col));
  }

  // There is no block of values to compute them with.
  void measure_empty() const {
    if (mean_ != nullptr) std::fill(mean_, mean_ + x_.rows, 0.0f);
    std::fill(rstd_, rstd_ + x_.rows, inverse_deviation(0.0f, eps_));
  }

 private:
  GroupedView saved_;
  float *mean_, *rstd_;
  TensorView x_;
  float eps_;
};

// The sums of the columns of `partial` [pieces, cols], by strands of pieces (normalize.h).
void sum_pieces(float* out, const std::vector<float>& partial, int64_t pieces, int64_t cols) {
  constexpr int64_t kWidth = 64;  // columns whose strands stay in the first-level cache
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t col = begin * kWidth; col < std::min(end * kWidth, cols); col += kWidth) {
      const int64_t n = std::min(kWidth, cols - col);
      float strands[kRowStrands][kWidth] = {};
      for (int64_t p = 0; p < pieces; ++p)
        for (int64_t c = 0; c < n; ++c) strands[p % kRowStrands][c] += partial[p * cols + col + c];
      for (int half = kRowStrands / 2; half > 0; half /= 2)
        for (int k = 0; k < half; ++k)
          for (int64_t c = 0; c < n; ++c) strands[k][c] += strands[k + half][c];
      std::copy_n(strands[0], n, out + col);
    }
  };
  const int64_t grain = kGrain / std::max<int64_t>(pieces * kWidth, 1);
  parallel_for((cols + kWidth - 1) / kWidth, grain, body);
}

}  // namespace

void normalize(const GemmCast& y, const GroupedView& saved, float* mean, float* rstd,
               const TensorView& x, const TensorView& weight, const TensorView& bias, float eps) {
  check_normalize(y, saved, x, weight, bias);
  const Channels weights(weight), biases(bias);
  const Rows of(saved, mean, rstd, x, eps);
  if (x.cols == 0) of.measure_empty();
  cast_both(&y, 1, x.rows, x.cols, [&](const Strip& s, bool first, Sink& sink) {
    alignas(64) float values[kBlock];
    for (int64_t row = s.row; row < s.row + s.rows; ++row) {
      if (first) of.measure(row);
      for (int64_t col = 0; col < x.cols; col += kBlock) {
        const int64_t n = std::min(kBlock, x.cols - col);
        of.normalize(values, row, col, n, weights, biases);
        sink.put(0, row, col, n, values);
      }
    }
    for (int64_t col = 0; col < x.cols; col += kBlock)
      sink.finish(s, col, std::min(kBlock, x.cols - col));
  });
}

void normalize_layouts(const LayoutsCast& y, const GroupedView& saved, float* mean, float* rstd,
                       const TensorView& x, const TensorView& weight, const TensorView& bias,
                       float eps) {
  check_normalize_inputs("normalize_layouts", saved, x, weight, bias);
  check_blocks("normalize_layouts", y, x.rows, x.cols);
  clear_layouts(y, x.rows, x.cols);
  const Channels weights(weight), biases(bias);
  const Rows of(saved, mean, rstd, x, eps);
  if (x.cols == 0) return of.measure_empty();
  auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) of.measure(row);
  };
  parallel_for(x.rows, kGrain / x.cols, rows);
  for_squares(x, [&](const Square& s) {
    SquareBuffer buffer;
    for (int64_t r = 0; r < s.x.rows; ++r)
      of.normalize(buffer.row(r), s.row + r, s.col, s.x.cols, weights, biases);
    cast_square(y, buffer.at(s));
  });
}

void normalize_backward(const TensorView& dx, float* dweight, float* dbias, const TensorView& dy,
                        const GroupedView& x, const float* mean, const float* rstd,
                        const TensorView& weight) {
  check_normalize_backward(dx, dy, x, weight);
  const int64_t rows = dy.rows, cols = dy.cols, pieces = row_pieces(rows);
  const int64_t groups = blocks_in_row(cols, x.layout.block);
  const auto size = static_cast<size_t>(pieces * cols);
  const Channels weights(weight);
  std::vector<float> dweights(dweight != nullptr ? size : 0), dbiases(dbias != nullptr ? size : 0);
  auto piece_body = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kRowPiece; row < std::min(end * kRowPiece, rows); ++row) {
      NormalizeRow r;
      r.dx = dx.as<char>() + row * cols * size_of(dx.dtype);
      r.dy = at(dy, row * cols);
      r.dx_type = dx.dtype;
      r.dy_type = dy.dtype;
      r.x = {x.codes.as<const uint8_t>() + row * cols, x.scale + row * groups, x.layout.block};
      r.mean = mean != nullptr ? mean[row] : 0.0f;
      r.rstd = rstd[row];
      r.centered = mean != nullptr;
      r.weight = weights.from(0);
      r.dweight = dweight != nullptr ? dweights.data() + row / kRowPiece * cols : nullptr;
      r.dbias = dbias != nullptr ? dbiases.data() + row / kRowPiece * cols : nullptr;
      activation_simd().normalize_backward(r, cols);
    }
  };
  parallel_for(pieces, kGrain / std::max<int64_t>(kRowPiece * cols, 1), piece_body);
  if (dweight != nullptr) sum_pieces(dweight, dweights, pieces, cols);
  if (dbias != nullptr) sum_pieces(dbias, dbiases, pieces, cols);
}

}  // namespace quaver::cpu
