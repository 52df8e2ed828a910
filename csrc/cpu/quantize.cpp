#include "quaver/quantize.h"

#include <algorithm>

#include "../arguments.h"
#include "parallel.h"
#include "simd.h"

namespace quaver::cpu {
namespace {

// Read twice in a pass (amax, then cast), so a span should stay in the first-level cache.
constexpr int64_t kSpan = 512;

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

uint32_t whole_amax(const TensorView& x) {
  AtomicAmax amax;
  auto body = [&](int64_t begin, int64_t end) {
    amax.add(simd().amax(at(x, begin), x.dtype, end - begin));
  };
  parallel_for(x.numel(), kGrain, body);
  return amax.bits();
}

// The scale of a whole-tensor cast. `known` says that *amax is already the tensor's.
float choose_scale(const TensorView& x, float finite_max, bool power_of_two, float* scale,
                   const ScaleSource& source, float* amax, bool* known) {
  *known = false;
  if (source.given) return *scale;
  float chosen = 0.0f;
  if (source.history != nullptr) chosen = delayed_scale(source.history, finite_max, power_of_two);
  if (chosen == 0.0f) {
    *amax = bit_cast<float>(whole_amax(x));
    *known = true;
    chosen = scale_from_amax(*amax, finite_max, power_of_two);
  }
  *scale = chosen;
  return chosen;
}

void quantize_tensor(const TensorView& q, float* scale, float* amax, const TensorView& x,
                     const QuantizeOptions& o, const ScaleSource& source) {
  bool known;
  const float s = choose_scale(x, scale_max(q.dtype), o.power_of_two, scale, source, amax, &known);
  AtomicAmax collected;
  auto body = [&](int64_t begin, int64_t end) {
    // After a pass for the amax, from the back: what that pass read last is still in the cache.
    for (int64_t left = known ? end : begin; left > begin;) {
      const int64_t n = std::min(kGrain, left - begin);
      left -= n;
      cast_span(q, x, left, n, s, o);
    }
    if (known) return;
    uint32_t bits = 0;
    for (int64_t i = begin; i < end; i += kSpan) {
      const int64_t n = std::min(kSpan, end - i);
      bits = std::max(bits, simd().amax(at(x, i), x.dtype, n));
      cast_span(q, x, i, n, s, o);
    }
    collected.add(bits);
  };
  parallel_for(x.numel(), kGrain, body);
  if (!known) *amax = bit_cast<float>(collected.bits());
  if (source.history != nullptr) record_amax(source.history, *amax);
}

}  // namespace

void quantize(const TensorView& q, const TensorView& scale, const TensorView& amax,
              const TensorView& x, const QuantizeOptions& o, const ScaleSource& source) {
  check_quantize(q, scale, amax, x, o, source);
  const int64_t groups = scale_count(x, o);
  if (o.granularity == Granularity::tensor) {
    quantize_tensor(q, scale.as<float>(), amax.as<float>(), x, o, source);
    return;
  }
  const int64_t width = o.granularity == Granularity::row ? x.cols : o.block;
  const int64_t per_row = width > 0 ? (x.cols + width - 1) / width : 1;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t row = g / std::max<int64_t>(per_row, 1);
      const int64_t first = (g - row * per_row) * width;
      const int64_t n = std::min(width, x.cols - first);
      const int64_t i = row * x.cols + first;
      const float a = bit_cast<float>(simd().amax(at(x, i), x.dtype, n));
      amax.as<float>()[g] = a;
      float* s = scale.as<float>() + g;
      if (!source.given) *s = scale_from_amax(a, scale_max(q.dtype), o.power_of_two);
      cast_span(q, x, i, n, *s, o);
    }
  };
  parallel_for(groups, kGrain / std::max<int64_t>(width, 1), body);
}

void dequantize(const TensorView& out, const TensorView& q, const TensorView& scale,
                const QuantizeOptions& o) {
  check_dequantize(out, q, scale, o);
  const int64_t groups = scale_count(q, o);
  const float* scales = scale.as<const float>();
  if (o.granularity == Granularity::tensor) {
    auto body = [&](int64_t begin, int64_t end) {
      simd().cast(out_at(out, begin), out.dtype, at(q, begin), q.dtype, end - begin, *scales,
                  false);
    };
    parallel_for(q.numel(), kGrain, body);
    return;
  }
  const int64_t width = o.granularity == Granularity::row ? q.cols : o.block;
  const int64_t per_row = width > 0 ? (q.cols + width - 1) / width : 1;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t row = g / std::max<int64_t>(per_row, 1);
      const int64_t first = (g - row * per_row) * width;
      const int64_t i = row * q.cols + first;
      simd().cast(out_at(out, i), out.dtype, at(q, i), q.dtype, std::min(width, q.cols - first),
                  scales[g], false);
    }
  };
  parallel_for(groups, kGrain / std::max<int64_t>(width, 1), body);
}

void cast_transpose(const TensorView& q, const TensorView& qt, const TensorView& scale,
                    const TensorView& amax, const TensorView& x, bool power_of_two,
                    const ScaleSource& source) {
  check_cast_transpose(q, qt, x, source);
  bool known;
  const float s = choose_scale(x, scale_max(q.dtype), power_of_two, scale.as<float>(), source,
                               amax.as<float>(), &known);
  const QuantizeOptions nearest;
  AtomicAmax collected;
  // A strip of kTile rows at a time: its codes are transposed while they are in cache.
  auto body = [&](int64_t begin, int64_t end) {
    uint32_t bits = 0;
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t row = strip * kTile;
      const int64_t rows = std::min(kTile, x.rows - row);
      for (int64_t col = 0; col < x.cols; col += kBlock) {
        const int64_t cols = std::min(kBlock, x.cols - col);
        for (int64_t r = row; r < row + rows; ++r) {
          const int64_t i = r * x.cols + col;
          if (!known) bits = std::max(bits, simd().amax(at(x, i), x.dtype, cols));
          cast_span(q, x, i, cols, s, nearest);
        }
        for (int64_t c = col; c < col + cols; c += kTile)
          simd().transpose(qt.as<uint8_t>() + c * qt.cols + row, qt.cols,
                           q.as<uint8_t>() + row * q.cols + c, q.cols, rows,
                           std::min(kTile, col + cols - c));
      }
    }
    collected.add(bits);
  };
  parallel_for((x.rows + kTile - 1) / kTile, kGrain / std::max<int64_t>(kTile * x.cols, 1), body);
  if (!known) *amax.as<float>() = bit_cast<float>(collected.bits());
  if (source.history != nullptr) record_amax(source.history, *amax.as<float>());
}

}  // namespace quaver::cpu
