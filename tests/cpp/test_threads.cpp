// Every op of the CPU backend on several threads: the bits of one thread, and, built with
// ThreadSanitizer (make test-sanitize), no data race.
#include <algorithm>
#include <functional>
#include <thread>
#include <vector>

#include "quaver/activate.h"
#include "quaver/all_reduce.h"
#include "quaver/cpu.h"
#include "quaver/normalize.h"
#include "quaver/optimizer.h"
#include "quaver/philox.h"
#include "test.h"

using namespace quaver;

namespace {

constexpr int kThreads = 4;
constexpr int64_t kRows = 528, kCols = 272, kSize = kRows * kCols;  // several pieces of work

void on_threads(int64_t n, int64_t grain, void* context, cpu::ParallelBody body) {
  const int64_t pieces = std::min<int64_t>((n + grain - 1) / grain, kThreads);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < pieces; ++i)
    threads.emplace_back(body, context, n * i / pieces, n * (i + 1) / pieces);
  for (std::thread& t : threads) t.join();
}

void on_one(int64_t n, int64_t, void* context, cpu::ParallelBody body) { body(context, 0, n); }

std::vector<float> some_values(int64_t n, uint64_t seed) {
  std::vector<float> x(n);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<int32_t>(random_bits(seed, i)) * 0x1p-29f;
  return x;
}

template <class T>
TensorView view(std::vector<T>& data, DType type, int64_t rows, int64_t cols) {
  return {data.data(), type, rows, cols};
}

// All that ops write, zero at first.
struct Results {
  std::vector<uint8_t> q, qt, saved, saved_up;
  std::vector<uint8_t> saved_scale, saved_up_scale;
  std::vector<float> scale, amax, values, columns, more;
  std::vector<int32_t> counts;

  Results()
      : q(kSize),
        qt(kSize),
        saved(kSize),
        saved_up(kSize),
        saved_scale(kSize),
        saved_up_scale(kSize),
        scale(kSize),
        amax(kSize),
        values(kSize),
        columns(kSize),
        more(kSize),
        counts(8) {}

  bool operator==(const Results& o) const {
    return q == o.q && qt == o.qt && saved == o.saved && saved_up == o.saved_up &&
           saved_scale == o.saved_scale && saved_up_scale == o.saved_up_scale && scale == o.scale &&
           amax == o.amax && values == o.values && columns == o.columns && more == o.more &&
           counts == o.counts;
  }
  GemmCast cast(bool up = false) {
    GemmCast c;
    c.q = view(up ? saved : q, DType::e4m3, kRows, kCols);
    c.qt = view(up ? saved_up : qt, DType::e4m3, kCols, kRows);
    c.scale = scale.data() + up;
    c.amax = amax.data() + up;
    return c;
  }
  GroupedView groups(bool up = false) {
    GroupedView g;
    g.codes = view(up ? saved_up : saved, DType::e4m3, kRows, kCols);
    g.scale = (up ? saved_up_scale : saved_scale).data();
    return g;
  }
  StateView state(Scaling scaling) {
    return {view(q, DType::e4m3, kRows, kCols), scale.data(), nullptr, scaling};
  }
};

void check(const std::function<void(Results*)>& op) {
  Results wanted, got;
  cpu::set_parallel_for(on_one);
  op(&wanted);
  cpu::set_parallel_for(on_threads);
  op(&got);
  cpu::set_parallel_for(on_one);
  CHECK(wanted == got);
}

std::vector<float> x = some_values(kSize, 1), up = some_values(kSize, 2);

TensorView input(std::vector<float>& values) { return view(values, DType::f32, kRows, kCols); }

}  // namespace

TEST(casts) {
  for (const Grain grain : {Grain::tensor, Grain::row, Grain::block}) {
    for (const bool stochastic : {false, true}) {
      check([&](Results* r) {
        QuantizeOptions o;
        o.layout.grain = grain;
        o.stochastic = stochastic;
        const int64_t n = o.layout.scale_count(input(x));
        const TensorView q = view(r->q, DType::e4m3, kRows, kCols);
        const TensorView scale = view(r->scale, DType::f32, 1, n);
        cpu::quantize(q, scale, view(r->amax, DType::f32, 1, n), input(x), o, {});
        cpu::dequantize(view(r->values, DType::f32, kRows, kCols), q, scale, o.layout);
      });
    }
  }
  check([](Results* r) {
    float history[kHistoryState] = {};
    for (int step = 0; step < kHistory + 2; ++step) {
      if (step == kHistory + 1) history[1] = 1e6f;  // a stale forecast: two passes
      cpu::cast_transpose(view(r->q, DType::e4m3, kRows, kCols),
                          view(r->qt, DType::e4m3, kCols, kRows), view(r->scale, DType::f32, 1, 1),
                          view(r->amax, DType::f32, 1, 1), input(x), true, {false, history});
    }
  });
}

TEST(norms_and_activations) {
  std::vector<float> weight = some_values(kCols, 3), dy = some_values(kSize, 4);
  const TensorView w = view(weight, DType::f32, 1, kCols);
  check([&](Results* r) {
    cpu::normalize(r->cast(), r->groups(true), r->values.data(), r->columns.data(), input(x), w, w,
                   1e-6f);
    cpu::normalize_backward(view(r->more, DType::f32, kRows, kCols), r->amax.data() + 1,
                            r->scale.data() + 1, input(dy), r->groups(true), r->values.data(),
                            r->columns.data(), w);
  });
  check([&](Results* r) {
    cpu::activate(r->cast(), r->groups(), r->groups(true), r->columns.data(), input(x), input(up),
                  weight.data(), Activation::silu);
  });
  Results saved;
  cpu::activate(saved.cast(), saved.groups(), saved.groups(true), nullptr, input(x), input(up),
                nullptr, Activation::gelu);
  check([&](Results* r) {
    cpu::activate_backward(r->cast(), r->cast(true), input(dy), saved.groups(), saved.groups(true),
                           nullptr, Activation::gelu);
  });
}

TEST(gradients) {
  check([](Results* r) {
    const ScaledView grads[2] = {{input(x)}, {input(up)}};
    cpu::grad_norm(r->scale.data(), r->amax.data(), grads, 2);
    r->scale[0] = r->scale[1] = 0.25f;
    cpu::accumulate(view(r->q, DType::e4m3, kRows, kCols), r->scale.data(), r->amax.data(),
                    {input(x)});
  });
  check([](Results* r) {
    const ScaledView tensors[2] = {{input(x)}, {input(up)}};
    const float scales[2] = {0.5f, 0.25f}, sum_scales[2] = {1.0f, 0.5f};
    std::vector<uint8_t> bucket(2 * kSize);
    cpu::pack(view(bucket, DType::e4m3, 1, 2 * kSize), tensors, 2, scales);
    const int64_t sizes[2] = {kSize / 2, kSize / 2};
    const ShardedSum sum = {view(bucket, DType::e4m3, 2, kSize), 0, sizes, 2, scales, sum_scales};
    cpu::reduce_shards(view(r->q, DType::e4m3, 1, kSize), r->amax.data(), r->counts.data(), sum);
  });
}

TEST(states) {
  for (const Scaling scaling : {Scaling::group, Scaling::expand}) {
    check([&](Results* r) {
      cpu::encode_state(r->state(scaling), input(x));
      cpu::decode_state(view(r->values, DType::f32, kRows, kCols), r->state(scaling));
    });
  }
}

// The first call of each instruction set's code, and of its tables, from several threads at once.
TEST(calls_beside_each_other) {
  Results results[kThreads];
  std::vector<std::thread> threads;
  for (Results& r : results)
    threads.emplace_back([&r] {
      cpu::encode_state(r.state(Scaling::expand), input(x));
      cpu::decode_state(view(r.values, DType::f32, kRows, kCols), r.state(Scaling::expand));
      cpu::quantize(view(r.saved, DType::e4m3, kRows, kCols), view(r.amax, DType::f32, 1, 1),
                    view(r.more, DType::f32, 1, 1), input(up), {}, {});
    });
  for (std::thread& t : threads) t.join();
  for (const Results& r : results) CHECK(r == results[0]);
}
