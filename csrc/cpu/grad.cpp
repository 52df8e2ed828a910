#include "quaver/grad.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../arguments.h"
#include "parallel.h"
#include "quaver/scale.h"
#include "simd.h"

namespace quaver::cpu {
namespace {

// A fixed piece of one gradient: partial sums do not depend on the number of threads.
struct Piece {
  int64_t tensor, begin, n;
};

float scale_of(const ScaledView& g) { return g.scale != nullptr ? *g.scale : 1.0f; }

const char* at(const TensorView& x, int64_t i) { return x.as<const char>() + i * size_of(x.dtype); }

}  // namespace

void grad_norm(float* norm, float* amax, const ScaledView* grads, int64_t count) {
  std::vector<Piece> pieces;
  for (int64_t t = 0; t < count; ++t) {
    amax[t] = 0.0f;
    const int64_t numel = grads[t].values.numel();
    for (int64_t i = 0; i < numel; i += kNormPiece)
      pieces.push_back({t, i, std::min(kNormPiece, numel - i)});
  }
  std::vector<double> sums(pieces.size());
  std::vector<uint32_t> maxima(pieces.size());
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const TensorView& x = grads[pieces[p].tensor].values;
      sums[p] = simd().sum_squares(at(x, pieces[p].begin), x.dtype, pieces[p].n, &maxima[p]);
    }
  };
  parallel_for(static_cast<int64_t>(pieces.size()), 1, body);
  double strands[kNormStrands] = {};
  for (size_t p = 0; p < pieces.size(); ++p) {
    const int64_t t = pieces[p].tensor;
    const double scale = scale_of(grads[t]);
    strands[p % kNormStrands] += sums[p] * scale * scale;
    const uint32_t seen = bit_cast<uint32_t>(amax[t]);
    amax[t] = bit_cast<float>(std::max(seen, maxima[p]));
  }
  for (int half = kNormStrands / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) strands[i] += strands[i + half];
  double total = strands[0];
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  for (int64_t t = 0; t < count; ++t) {
    amax[t] *= std::fabs(scale_of(grads[t]));
    if (grads[t].amax == nullptr || is_finite(*grads[t].amax)) continue;
    amax[t] = nan;
    total = nan;
  }
  *norm = static_cast<float>(std::sqrt(total));
}

void accumulate(const TensorView& target, float* scale, float* amax, const ScaledView& other) {
  check_accumulate(target, other);
  const TensorView& b = other.values;
  auto pass = [&](bool write, float new_scale) {
    AtomicAmax result;
    auto body = [&](int64_t begin, int64_t end) {
      char* a = target.as<char>() + begin * size_of(target.dtype);
      result.add(simd().add(write ? a : nullptr, target.dtype, new_scale, a, target.dtype, *scale,
                            at(b, begin), b.dtype, scale_of(other), end - begin));
    };
    parallel_for(target.numel(), kGrain, body);
    return bit_cast<float>(result.bits());
  };
  float new_scale = 1.0f;
  if (is_fp8(target.dtype))
    new_scale = scale_from_amax(pass(false, 1.0f), scale_max(target.dtype), true, *scale);
  const float sum_amax = pass(true, new_scale);
  const bool finite = is_finite(*amax) && (other.amax == nullptr || is_finite(*other.amax));
  *scale = new_scale;
  *amax = finite ? sum_amax : std::numeric_limits<float>::quiet_NaN();
}

}  // namespace quaver::cpu
