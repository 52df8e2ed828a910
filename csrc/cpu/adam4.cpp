#include "quaver/adam4.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "../check_adam4.h"
#include "parallel.h"
#include "simd_adam4.h"

namespace quaver::cpu {
namespace {

static_assert(kGrain % kGroup == 0, "a piece begins with a group, and with a byte");

struct Piece {
  size_t parameter;
  int64_t begin, n;
};

// The maxima of a rank-1 second moment that this step will store.
struct Maxima {
  std::unique_ptr<AtomicAmax[]> bits;
  std::vector<float> values;
};

Adam4Span span_of(const Adam4Parameter& p) {
  Adam4Span s = {};
  s.p = p;
  const double* h = p.hyper;
  s.step = adam_step(h[0], h[1], h[2], h[3], h[4], next_step(*p.step));
  s.dither = make_dither(p.seed, static_cast<uint64_t>(*p.step));
  s.grad_scale = p.grad_scale != nullptr ? *p.grad_scale : 1.0f;
  return s;
}

template <class Body>
void for_pieces(const std::vector<Piece>& pieces, Body body) {
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) body(pieces[static_cast<size_t>(k)]);
  };
  parallel_for(static_cast<int64_t>(pieces.size()), 1, run);
}

void find_maxima(std::vector<Adam4Span>& spans, std::vector<Maxima>& maxima,
                 const std::vector<Piece>& pieces) {
  for (size_t i = 0; i < spans.size(); ++i) {
    const Adam4Parameter& p = spans[i].p;
    if (p.second != Second::rank1) continue;
    const auto count = static_cast<size_t>(second_scale_count(p.second, p.shape, p.weight.numel()));
    maxima[i].bits = std::make_unique<AtomicAmax[]>(count);
    maxima[i].values.resize(count);
    spans[i].maxima = maxima[i].bits.get();
  }
  for_pieces(pieces, [&](const Piece& piece) {
    const Adam4Span& s = spans[piece.parameter];
    if (s.maxima == nullptr) return;
    const int64_t width = std::min(columns_of(s.p.shape), piece.n);
    std::vector<int32_t> of_column(static_cast<size_t>(width));
    adam4_simd().find_maxima(s, piece.begin, piece.n, of_column.data());
  });
  for (size_t i = 0; i < spans.size(); ++i) {
    std::vector<float>& values = maxima[i].values;
    for (size_t k = 0; k < values.size(); ++k)
      values[k] = bit_cast<float>(maxima[i].bits[k].bits());
    spans[i].new_maxima = values.data();
  }
}

}  // namespace

void adam4(const Adam4Parameter* parameters, int64_t count, int64_t* skipped) {
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    check_adam4(parameters[i]);
    const int64_t taken = *parameters[i].step;
    QUAVER_CHECK(taken >= 0 && taken < INT64_MAX,
                 "adam_4bit_: a step count must be in [0, 2^63 - 1), got ", taken);
    finite = finite && is_finite(*parameters[i].grad_amax);
  }
  if (!finite) {
    ++*skipped;
    return;
  }
  std::vector<Adam4Span> spans;
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < count; ++i) {
    spans.push_back(span_of(parameters[i]));
    const int64_t n = parameters[i].weight.numel();
    for (int64_t begin = 0; begin < n; begin += kGrain)
      pieces.push_back({static_cast<size_t>(i), begin, std::min(kGrain, n - begin)});
  }
  std::vector<Maxima> maxima(spans.size());
  find_maxima(spans, maxima, pieces);
  for_pieces(pieces, [&](const Piece& piece) {
    adam4_simd().step(spans[piece.parameter], piece.begin, piece.n);
  });
  for (size_t i = 0; i < spans.size(); ++i) {
    std::copy(maxima[i].values.begin(), maxima[i].values.end(), spans[i].p.exp_avg_sq_scale);
    *spans[i].p.step = next_step(*spans[i].p.step);
  }
}

}  // namespace quaver::cpu
