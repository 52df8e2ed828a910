#include "quaver/subset.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../check_subset.h"
#include "parallel.h"
#include "simd.h"

namespace quaver::cpu {
namespace {

// Consecutive subsets of one gradient, or elements of one that has none.
struct Piece {
  int64_t grad, begin, end;
};

void add_pieces(const SubsetGrad& g, int64_t index, std::vector<Piece>* pieces) {
  const Subsets& s = g.subsets;
  const int64_t n = g.grad.values.numel();
  int64_t count = n, size = kGrain;
  if (s.width != 0) {
    count = subset_count(s, n);
    const int64_t each = s.strided ? n / s.width : s.width;
    // Columns at least a block at a time: a row of fewer is too short a stream.
    size = std::max(kGrain / std::max<int64_t>(each, 1), s.strided ? kBlock : 1);
  }
  for (int64_t begin = 0; begin < count; begin += size)
    pieces->push_back({index, begin, std::min(begin + size, count)});
}

float scale_of(const ScaledView& g) { return g.scale != nullptr ? *g.scale : 1.0f; }

uint32_t run(const SubsetGrad& g, const Piece& p) {
  const TensorView& x = g.grad.values;
  const float scale = scale_of(g.grad);
  if (g.subsets.width != 0)
    return simd().subset_sums({x.data, x.dtype, scale, x.numel(), g.sums, g.subsets}, p.begin,
                              p.end);
  const char* from = x.as<const char>() + p.begin * size_of(x.dtype);
  const float most = bit_cast<float>(simd().amax(from, x.dtype, p.end - p.begin));
  return bit_cast<uint32_t>(most * std::fabs(scale)) & 0x7fffffffu;
}

}  // namespace

void subset_sums(float* amax, const SubsetGrad* grads, int64_t count) {
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < count; ++i) {
    check_subset_sums(grads[i]);
    add_pieces(grads[i], i, &pieces);
  }
  std::vector<uint32_t> maxima(pieces.size());
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) maxima[k] = run(grads[pieces[k].grad], pieces[k]);
  };
  parallel_for(static_cast<int64_t>(pieces.size()), 1, body);
  std::vector<uint32_t> most(count);
  for (size_t k = 0; k < pieces.size(); ++k)
    most[pieces[k].grad] = std::max(most[pieces[k].grad], maxima[k]);
  for (int64_t i = 0; i < count; ++i) {
    const ScaledView& g = grads[i].grad;
    const bool finite = is_finite(scale_of(g)) && (g.amax == nullptr || is_finite(*g.amax));
    amax[i] = finite ? bit_cast<float>(most[i]) : std::numeric_limits<float>::quiet_NaN();
  }
}

}  // namespace quaver::cpu
