#include "quaver/quantize.h"

#include <algorithm>

#include "../arguments.h"
#include "parallel.h"
#include "simd.h"

namespace quaver::cpu {
namespace {

const char* at(const TensorView& x, int64_t i) { return x.as<const char>() + i * size_of(x.dtype); }
char* out_at(const TensorView& x, int64_t i) { return x.as<char>() + i * size_of(x.dtype); }

// Encoding multiplies by the reciprocal where that is exact.
void cast_span(const TensorView& q, const TensorView& x, int64_t begin, int64_t n, float scale,
               const QuantizeOptions& o) {
  if (o.stochastic) {
    simd().cast_stochastic(out_at(q, begin), q.dtype, at(x, begin), x.dtype, n, scale, o.seed,
                           static_cast<uint64_t>(begin));
    return;
  }
  const bool exact = is_power_of_two(scale);
  simd().cast(out_at(q, begin), q.dtype, at(x, begin), x.dtype, n, exact ? 1.0f / scale : scale,
              !exact);
}

// As cast_span, to nearest; returns the bits of the amax of the span.
uint32_t cast_seen(const TensorView& q, const TensorView& x, int64_t begin, int64_t n,
                   float scale) {
  const bool exact = is_power_of_two(scale);
  return simd().cast_seen(out_at(q, begin), q.dtype, at(x, begin), x.dtype, n,
                          exact ? 1.0f / scale : scale, !exact);
}

// The values under scale g: `rows` spans of `cols` elements, of which the first begins at `first`.
struct Group {
  int64_t first, rows, cols;
};

Group group_of(const TensorView& x, const Layout& layout, int64_t g) {
  const int64_t width = layout.width(x.cols), per_row = layout.scales_in_row(x.cols);
  const int64_t row = g / per_row * layout.height(), col = g % per_row * width;
  return {row * x.cols + col, std::min(layout.height(), x.rows - row),
          std::min(width, x.cols - col)};
}

// Scales per piece of work of `grain` values.
int64_t group_grain(const TensorView& x, const Layout& layout, int64_t grain) {
  return grain / std::max<int64_t>(layout.width(x.cols) * layout.height(), 1);
}

uint32_t whole_amax(const TensorView& x) {
  AtomicAmax amax;
  auto body = [&](int64_t begin, int64_t end) {
    amax.add(simd().amax(at(x, begin), x.dtype, end - begin));
  };
  parallel_for(x.numel(), kLightGrain, body);
  return amax.bits();
}

// A cast under one scale. pass(scale, see) casts all of x and, where it is to see, returns the bits
// of its amax. A scale that a history gives is tried first; x is cast again where it is stale.
template <class Pass>
void cast_whole(const TensorView& x, DType type, bool power_of_two, float* scale, float* amax,
                const ScaleSource& source, Pass pass) {
  const float finite_max = scale_max(type);
  float chosen = source.given ? *scale : 0.0f;
  if (source.history != nullptr) chosen = delayed_scale(source.history, finite_max, power_of_two);
  const bool known = source.given || chosen != 0.0f;
  *amax = bit_cast<float>(known ? pass(chosen, true) : whole_amax(x));
  if (!source.given && is_stale(chosen, *amax, finite_max)) {
    chosen = scale_from_amax(*amax, finite_max, power_of_two);
    pass(chosen, false);
  }
  *scale = source.spread_nan && !source.given ? nan_unless_finite(chosen, *amax) : chosen;
  if (source.history != nullptr) record_amax(source.history, *amax);
}

uint32_t quantize_pass(const TensorView& q, const TensorView& x, const QuantizeOptions& o,
                       float scale, bool see) {
  AtomicAmax amax;
  auto body = [&](int64_t begin, int64_t end) {
    // After a pass for the amax this one runs from the back, whose values are still in the cache.
    for (int64_t left = see ? begin : end; left > begin;) {
      const int64_t n = std::min(kGrain, left - begin);
      left -= n;
      cast_span(q, x, left, n, scale, o);
    }
    if (!see) return;
    if (!o.stochastic) return amax.add(cast_seen(q, x, begin, end - begin, scale));
    uint32_t bits = 0;
    for (int64_t i = begin; i < end; i += kBlock) {  // read twice, the second time from the cache
      const int64_t n = std::min(kBlock, end - i);
      bits = std::max(bits, simd().amax(at(x, i), x.dtype, n));
      cast_span(q, x, i, n, scale, o);
    }
    amax.add(bits);
  };
  parallel_for(x.numel(), o.stochastic ? kGrain : kLightGrain / 2, body);
  return amax.bits();
}

// A strip of kTile rows at a time: its codes are transposed while they are in cache.
uint32_t cast_transpose_pass(const TensorView& q, const TensorView& qt, const TensorView& x,
                             float scale, bool see) {
  const QuantizeOptions nearest;
  AtomicAmax amax;
  auto body = [&](int64_t begin, int64_t end) {
    uint32_t bits = 0;
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t row = strip * kTile;
      const int64_t rows = std::min(kTile, x.rows - row);
      for (int64_t col = 0; col < x.cols; col += kBlock) {
        const int64_t cols = std::min(kBlock, x.cols - col);
        for (int64_t r = row; r < row + rows; ++r) {
          const int64_t i = r * x.cols + col;
          if (see)
            bits = std::max(bits, cast_seen(q, x, i, cols, scale));
          else
            cast_span(q, x, i, cols, scale, nearest);
        }
        simd().transpose(qt.as<uint8_t>() + col * qt.cols + row, qt.cols,
                         q.as<uint8_t>() + row * q.cols + col, q.cols, rows, cols,
                         streams(q.numel()));
      }
    }
    amax.add(bits);
  };
  parallel_for((x.rows + kTile - 1) / kTile, kGrain / std::max<int64_t>(kTile * x.cols, 1), body);
  return amax.bits();
}

}  // namespace

void quantize(const TensorView& q, const TensorView& scale, const TensorView& amax,
              const TensorView& x, const QuantizeOptions& o, const ScaleSource& source) {
  check_quantize(q, scale, amax, x, o, source);
  if (o.layout.grain == Grain::tensor) {
    cast_whole(x, q.dtype, o.power_of_two, scale.as<float>(), amax.as<float>(), source,
               [&](float s, bool see) { return quantize_pass(q, x, o, s, see); });
    return;
  }
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const Group of = group_of(x, o.layout, g);
      uint32_t bits = 0;
      for (int64_t r = 0; r < of.rows; ++r)
        bits = std::max(bits, simd().amax(at(x, of.first + r * x.cols), x.dtype, of.cols));
      const float a = bit_cast<float>(bits);
      amax.as<float>()[g] = a;
      float* s = scale.as<float>() + g;
      if (!source.given) *s = scale_from_amax(a, scale_max(q.dtype), o.power_of_two);
      for (int64_t r = 0; r < of.rows; ++r) cast_span(q, x, of.first + r * x.cols, of.cols, *s, o);
    }
  };
  parallel_for(scale.numel(), group_grain(x, o.layout, kGrain), body);
}

void dequantize(const TensorView& out, const TensorView& q, const TensorView& scale,
                const Layout& layout) {
  check_dequantize(out, q, scale, layout);
  const float* scales = scale.as<const float>();
  if (layout.grain == Grain::tensor) {
    auto body = [&](int64_t begin, int64_t end) {
      simd().cast(out_at(out, begin), out.dtype, at(q, begin), q.dtype, end - begin, *scales,
                  false);
    };
    parallel_for(q.numel(), kLightGrain, body);
    return;
  }
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const Group of = group_of(q, layout, g);
      for (int64_t r = 0; r < of.rows; ++r) {
        const int64_t i = of.first + r * q.cols;
        simd().cast(out_at(out, i), out.dtype, at(q, i), q.dtype, of.cols, scales[g], false);
      }
    }
  };
  parallel_for(scale.numel(), group_grain(q, layout, kLightGrain), body);
}

void cast_transpose(const TensorView& q, const TensorView& qt, const TensorView& scale,
                    const TensorView& amax, const TensorView& x, bool power_of_two,
                    const ScaleSource& source) {
  check_cast_transpose(q, qt, x, source);
  cast_whole(x, q.dtype, power_of_two, scale.as<float>(), amax.as<float>(), source,
             [&](float s, bool see) { return cast_transpose_pass(q, qt, x, s, see); });
}

}  // namespace quaver::cpu
