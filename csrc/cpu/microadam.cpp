#include "quaver/microadam.h"

#include <algorithm>
#include <vector>

#include "../check_microadam.h"
#include "parallel.h"
#include "simd_microadam.h"

namespace quaver::cpu {
namespace {

// A list of parameters whose blocks are numbered through: parameter i owns those from first[i] on.
struct Blocks {
  std::vector<const MicroAdamSpan*> owner;
  std::vector<int64_t> first;
  int64_t count = 0;

  void add(const MicroAdamSpan* span) {
    owner.push_back(span);
    first.push_back(count);
    count += top_block_count(span->p.weight.numel());
  }

  void run(MicroAdamPart part) const {
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const auto next = std::upper_bound(first.begin(), first.end(), b);
        const size_t i = static_cast<size_t>(next - first.begin()) - 1;
        micro_adam_simd().block(*owner[i], b - first[i], part);
      }
    };
    parallel_for(count, kGrain / kTopBlock, body);
  }
};

MicroAdamSpan span_of(const MicroAdamParameter& p) {
  MicroAdamSpan s = {};
  s.p = p;
  s.step = micro_adam_step(p.hyper, p.window, next_step(*p.step));
  s.dither = make_dither(p.seed, static_cast<uint64_t>(*p.step));
  s.grad_scale = p.grad_scale != nullptr ? *p.grad_scale : 1.0f;
  s.range = p.range;
  return s;
}

// The ranges of error blocks that cross top blocks, until all blocks have read those of the step
// before.
struct CrossingRanges {
  std::vector<OrderRange> partial;
  std::vector<bf16> range;

  void prepare(MicroAdamSpan* s) {
    partial.resize(2 * static_cast<size_t>(top_block_count(s->p.weight.numel())));
    range.resize(2 * static_cast<size_t>(size(s->p)));
    s->partial = partial.data();
    s->range = range.data();
  }

  void join(const MicroAdamParameter& p) {
    const int64_t numel = p.weight.numel();
    std::vector<OrderRange> whole(static_cast<size_t>(size(p)));
    for (int64_t b = 0; b < top_block_count(numel); ++b) {
      const int64_t begin = b * kTopBlock, last = std::min(begin + kTopBlock, numel) - 1;
      const int64_t first = begin / p.error_block;
      for (int64_t k = 0; k <= last / p.error_block - first; ++k) {
        OrderRange& r = whole[static_cast<size_t>(first + k)];
        const OrderRange& part = partial[static_cast<size_t>(2 * b + k)];
        r = {std::min(r.low, part.low), std::max(r.high, part.high)};
      }
    }
    for (size_t i = 0; i < whole.size(); ++i) {
      range[2 * i] = range_low(whole[i].low, whole[i].high);
      range[2 * i + 1] = range_high(whole[i].high);
    }
  }

  static int64_t size(const MicroAdamParameter& p) {
    return error_block_count(p.weight.numel(), p.error_block);
  }
};

}  // namespace

void micro_adam(const MicroAdamParameter* parameters, int64_t count, int64_t* skipped) {
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    check_micro_adam(parameters[i]);
    const int64_t taken = *parameters[i].step;
    QUAVER_CHECK(taken >= 0 && taken < INT64_MAX,
                 "micro_adam_: a step count must be in [0, 2^63 - 1), got ", taken);
    finite = finite && is_finite(*parameters[i].grad_amax);
  }
  if (!finite) {
    ++*skipped;
    return;
  }
  std::vector<MicroAdamSpan> spans;
  for (int64_t i = 0; i < count; ++i) spans.push_back(span_of(parameters[i]));
  std::vector<CrossingRanges> ranges(static_cast<size_t>(count));
  Blocks inside, crossing;
  for (size_t i = 0; i < spans.size(); ++i) {
    const bool is_crossing = !is_inside(spans[i].p.error_block);
    if (is_crossing) ranges[i].prepare(&spans[i]);
    (is_crossing ? crossing : inside).add(&spans[i]);
  }
  inside.run(MicroAdamPart::all);
  crossing.run(MicroAdamPart::keep);
  for (size_t i = 0; i < spans.size(); ++i)
    if (spans[i].partial != nullptr) ranges[i].join(spans[i].p);
  crossing.run(MicroAdamPart::store);
  for (size_t i = 0; i < spans.size(); ++i) {
    std::copy(ranges[i].range.begin(), ranges[i].range.end(), spans[i].p.range);
    *spans[i].p.step = next_step(*spans[i].p.step);
  }
}

}  // namespace quaver::cpu
