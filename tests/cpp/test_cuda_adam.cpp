// adam of the CUDA backend, run on the host: the bits of the CPU backend, step after step.
#include "quaver/codec.h"
#include "quaver/optimizer.h"
#include "simt/cases.h"

using namespace quaver;
using namespace quaver::test;

namespace {

struct Layout {
  Shape shape;
  DType weight, exp_avg, exp_avg_sq, grad;
  bool fp8 = false;
  int64_t skew = 0;
  Scaling exp_avg_scaling = Scaling::tensor, exp_avg_sq_scaling = Scaling::tensor;
  int remainder = 0;                       // bytes of an element, of a bf16 weight
  bool stochastic = false, scaled = true;  // an f16 weight's scale
  int64_t first_element = 0;
  Subsets subsets;

  // Of state k: a second moment may have one for each subset.
  int64_t numel(int k) const {
    const int64_t n = shape.rows * shape.cols;
    return k == 2 && subsets.width != 0 ? subset_count(subsets, n) : n;
  }
};

constexpr Layout o2(Shape shape, DType grad = DType::e4m3) {
  return {shape, DType::f16, DType::e4m3, DType::f16, grad, true};
}

// COAT's moments.
constexpr Layout coat(Shape shape, DType weight, DType grad = DType::bf16) {
  Layout l = {shape, weight, DType::e4m3, DType::e4m3, grad};
  l.exp_avg_scaling = l.exp_avg_sq_scaling = Scaling::expand;
  return l;
}

constexpr Layout coat_with_copies(Shape shape) {
  Layout l = coat(shape, DType::f16, DType::e4m3);
  l.fp8 = true;
  return l;
}

// One parameter's memory, twice: once for each backend.
class Parameter {
 public:
  Parameter(const Layout& layout, uint64_t seed)
      : layout_(layout), cpu_(layout, seed), cuda_(layout, seed) {}

  void set_grad(uint64_t seed, float amax) {
    for (Copy* c : {&cpu_, &cuda_}) {
      fill(&c->grad, layout_.grad, numel(), seed);
      c->grad_amax = amax;
    }
  }
  // Puts a code into state k of both.
  void put(int k, int64_t i, unsigned char code) {
    for (Copy* c : {&cpu_, &cuda_}) c->state[k].data()[i] = code;
  }
  void put_grad(int64_t i, float x) {
    for (Copy* c : {&cpu_, &cuda_}) c->grad.as<bf16>()[i] = encode_nearest<bf16>(x);
  }
  AdamParameter cpu() { return cpu_.parameter(layout_); }
  AdamParameter cuda() { return cuda_.parameter(layout_); }
  int64_t step() const { return cpu_.step; }

  void check() {
    for (int k = 0; k < 3; ++k) {
      CHECK(cpu_.state[k].bytes() == cuda_.state[k].bytes());
      CHECK(cuda_.state[k].guards_hold());
    }
    for (int k = 1; k < 3; ++k) {
      CHECK(cpu_.groups[k].bytes() == cuda_.groups[k].bytes());
      CHECK(cuda_.groups[k].guards_hold());
    }
    CHECK(cpu_.remainder.bytes() == cuda_.remainder.bytes());
    CHECK(cuda_.remainder.guards_hold());
    CHECK(cpu_.fp8.bytes() == cuda_.fp8.bytes());
    CHECK(cpu_.fp8_t.bytes() == cuda_.fp8_t.bytes());
    CHECK(cuda_.fp8.guards_hold() && cuda_.fp8_t.guards_hold());
    CHECK(same_bits(cpu_.scales, cuda_.scales));
    CHECK(same_bits(cpu_.amaxes, cuda_.amaxes));
    CHECK_EQ(cpu_.step, cuda_.step);
  }

 private:
  struct Copy {
    Buffer state[3], groups[3], remainder, grad, fp8, fp8_t;
    std::vector<float> sums;                                     // of the gradient's subsets
    std::vector<float> scales{0.0625f, 1.0f, 1.0f, 0.5f, 1.0f};  // states, gradient, copy
    std::vector<float> amaxes{1.0f, 0.0f, 0.0f};
    float grad_amax = 1.0f;
    int64_t step = 0;
    double hyper[5] = {1e-2, 0.9, 0.95, 1e-8, 0.1};

    Copy(const Layout& l, uint64_t seed)
        : state{make(l, l.weight), make(l, l.exp_avg),
                Buffer(l.numel(2) * size_of(l.exp_avg_sq), l.skew * size_of(l.exp_avg_sq))},
          sums(l.numel(2)),
          groups{Buffer(0), group_scales(l), group_scales(l)},
          remainder(l.shape.rows * l.shape.cols * l.remainder, l.skew * l.remainder),
          grad(make(l, l.grad)),
          fp8(make(l, DType::e4m3, l.fp8)),
          fp8_t(make(l, DType::e4m3, l.fp8)) {
      for (size_t k = 0; k < sums.size(); ++k) sums[k] = 0.01f * float(k % 91);
      const int64_t n = l.shape.rows * l.shape.cols;
      fill(&state[0], l.weight, n, seed);
      for (Buffer* zero : {&state[1], &state[2], &groups[1], &groups[2], &remainder})
        for (unsigned char* b = zero->data(); b < zero->data() + zero->size(); ++b) *b = 0;
    }
    static Buffer group_scales(const Layout& l) {
      return Buffer(group_count(l.shape.rows * l.shape.cols) * 4);
    }
    static Buffer make(const Layout& l, DType type, bool present = true) {
      return Buffer(present ? l.shape.rows * l.shape.cols * size_of(type) : 0,
                    l.skew * size_of(type));
    }
    AdamParameter parameter(const Layout& l) {
      const int64_t rows = l.shape.rows, cols = l.shape.cols;
      AdamParameter p;
      StateView* states[] = {&p.weight, &p.exp_avg, &p.exp_avg_sq};
      const DType types[] = {l.weight, l.exp_avg, l.exp_avg_sq};
      for (int k = 0; k < 3; ++k) {
        const bool scaled = scale_max(types[k]) > 0.0f;
        *states[k] = {view(state[k], types[k], rows, cols), scaled ? &scales[k] : nullptr,
                      scaled ? &amaxes[k] : nullptr, Scaling::tensor};
      }
      if (!l.scaled) p.weight.scale = p.weight.amax = nullptr;
      const Scaling scalings[] = {Scaling::tensor, l.exp_avg_scaling, l.exp_avg_sq_scaling};
      for (int k = 1; k < 3; ++k) {
        if (scalings[k] == Scaling::tensor) continue;
        *states[k] = {states[k]->values, groups[k].as<float>(), nullptr, scalings[k]};
      }
      if (l.subsets.width != 0) {
        p.subsets = l.subsets;
        p.subset_sums = sums.data();
        p.exp_avg_sq = {view(state[2], l.exp_avg_sq, 1, l.numel(2))};
      }
      if (l.remainder > 0) p.remainder = {remainder.data(), l.remainder};
      p.stochastic = l.stochastic;
      p.seed = 17;
      p.first_element = l.first_element;
      p.grad = view(grad, l.grad, rows, cols);
      p.grad_scale = is_fp8(l.grad) ? &scales[3] : nullptr;
      p.grad_amax = &grad_amax;
      if (l.fp8) {
        p.fp8 = view(fp8, DType::e4m3, rows, cols);
        p.fp8_t = view(fp8_t, DType::e4m3, cols, rows);
        p.fp8_scale = &scales[4];
      }
      p.step = &step;
      p.hyper = hyper;
      return p;
    }
  };

  int64_t numel() const { return layout_.shape.rows * layout_.shape.cols; }

  Layout layout_;
  Copy cpu_, cuda_;
};

// Three steps, of which the second is skipped: one gradient is not finite.
void check(const std::vector<Layout>& layouts) {
  std::vector<Parameter> parameters;
  for (size_t i = 0; i < layouts.size(); ++i) parameters.emplace_back(layouts[i], 50 + i);
  const auto count = static_cast<int64_t>(layouts.size());
  int64_t skipped = 0, cuda_skipped = 0;
  for (int step = 0; step < 3; ++step) {
    std::vector<AdamParameter> cpu, cuda;
    for (size_t i = 0; i < layouts.size(); ++i) {
      const bool bad = step == 1 && i + 1 == layouts.size();
      parameters[i].set_grad(1000 * step + i, bad ? std::numeric_limits<float>::infinity() : 4.0f);
      cpu.push_back(parameters[i].cpu());
      cuda.push_back(parameters[i].cuda());
    }
    Buffer workspace(cuda::adam_workspace_bytes(cuda.data(), count));
    cpu::adam(cpu.data(), count, &skipped);
    cuda::adam(cuda.data(), count, &cuda_skipped, workspace.data(), nullptr);
    CHECK(workspace.guards_hold());
    for (Parameter& p : parameters) p.check();
  }
  CHECK_EQ(skipped, 1);
  CHECK_EQ(cuda_skipped, 1);
  for (const Parameter& p : parameters) CHECK_EQ(p.step(), 2);
}

}  // namespace

TEST(low_precision_of_every_shape) {
  for (const Shape& shape : kShapes) check({o2(shape)});
  for (const int64_t rows : {127, 128, 129, 256})
    for (const int64_t cols : {16, 127, 144, 257}) check({o2({rows, cols})});
}

TEST(every_type_of_state) {
  const DType moments[] = {DType::f32, DType::f16, DType::e4m3, DType::e5m2};
  for (const DType grad : {DType::f32, DType::bf16, DType::e5m2})
    for (const DType weight : {DType::f32, DType::bf16, DType::f16})
      for (const DType exp_avg : moments)
        for (const DType exp_avg_sq : moments)
          check({{{7, 100}, weight, exp_avg, exp_avg_sq, grad}});
}

TEST(states_in_groups) {
  for (const DType exp_avg : {DType::e4m3, DType::e5m2})
    for (const DType exp_avg_sq : {DType::e4m3, DType::e5m2, DType::f32})
      for (const Scaling first : {Scaling::group, Scaling::expand})
        for (const Scaling second : {Scaling::group, Scaling::expand}) {
          Layout l = {{9, 100}, DType::f32, exp_avg, exp_avg_sq, DType::f32};
          l.exp_avg_scaling = first;
          if (exp_avg_sq != DType::f32) l.exp_avg_sq_scaling = second;
          check({l});
        }
  for (const Shape& shape : kShapes) check({coat(shape, DType::f32)});
  for (const int64_t n : {1, 127, 128, 129, 16383, 16385}) check({coat({1, n}, DType::bf16)});
}

// Tiles where rows are whole groups, and otherwise a transposition afterwards.
TEST(groups_beside_gemm_copies) {
  for (const Shape& shape : kShapes) check({coat_with_copies(shape)});
  for (const int64_t rows : {1, 127, 130})
    for (const int64_t cols : {128, 144, 256, 257}) check({coat_with_copies({rows, cols})});
  in_every_order([] {
    check({coat_with_copies({40, 96}), o2({33, 48}), coat_with_copies({30, 128}),
           coat_with_copies({0, 5}), coat_with_copies({17, 40}), coat({3, 70}, DType::bf16)});
  });
}

TEST(masters_of_bf16_weights) {
  for (const int64_t n : {5, 128, 700}) {
    Layout exact = coat({1, n}, DType::bf16), random = exact, half = coat({1, n}, DType::f16);
    exact.remainder = 2;
    random.stochastic = true;
    half.scaled = false;
    Layout short_one = exact;
    short_one.remainder = 1;
    check({exact, random, half, short_one});
    for (Layout* l : {&exact, &random, &half, &short_one}) {
      l->skew = 1;
      check({*l});
    }
  }
}

// Rows of a tile, and shards, begin anywhere in a block of Philox.
TEST(masters_rounded_stochastically) {
  for (const Shape& shape : kShapes) {
    Layout l = o2(shape);
    l.stochastic = true;
    check({l});
  }
  // The last one passes 2^32 between four elements that are read at once.
  for (const int64_t first : {0l, 1l, 2l, 3l, 1000001l, (1l << 32) - 70})
    for (const int64_t cols : {4, 97, 130, 144}) {
      Layout tiled = o2({131, cols}), flat = coat({3, cols}, DType::bf16), half = flat;
      half.weight = DType::f16;
      half.scaled = false;
      for (Layout* l : {&tiled, &flat, &half}) {
        l->stochastic = true;
        l->first_element = first;
      }
      check({tiled, flat, half, coat_with_copies({4, cols})});
    }
}

// Second moments of rows, of columns and of runs, beside those of elements.
TEST(second_moments_of_subsets) {
  const auto with = [](Shape shape, Subsets subsets, DType weight, DType first, DType second) {
    Layout l = {shape, weight, first, second, DType::f32};
    l.subsets = subsets;
    l.stochastic = weight == DType::bf16 && shape.rows % 2 == 1;
    l.remainder = weight == DType::bf16 && shape.rows % 2 == 0 ? int(1 + shape.rows / 2 % 2) : 0;
    return l;
  };
  for (const Shape& s : kShapes)
    for (const DType second : {DType::f32, DType::bf16}) {
      if (s.cols == 0) continue;
      check({with(s, {s.cols, false}, DType::f32, DType::f32, second),
             with(s, {s.cols, true}, DType::bf16, DType::bf16, second),
             with(s, {3, false}, DType::bf16, DType::e4m3, second),
             with(s, {1, false}, DType::f32, DType::f16, second)});
    }
  for (const int64_t skew : {0, 1}) {
    Layout tiled = o2({130, 144}),
           run = with({1, 40000}, {20000, false}, DType::f32, DType::f32, DType::f32);
    tiled.subsets = {144, true};
    tiled.exp_avg_sq = DType::f32;
    tiled.skew = run.skew = skew;
    check({tiled, o2({3, 70}), run,
           with({3, 5}, {1 << 20, false}, DType::f32, DType::f32, DType::bf16)});
  }
}

// A warp takes four groups at once where all are whole and all is a number: here an edge, NaN, a
// second moment with a sign, one that overflows, and zeros, each in groups of its own.
TEST(expanded_moments_that_are_no_numbers) {
  constexpr int64_t kSpan = 512;
  Layout l = coat({1, 9 * kSpan + 132}, DType::bf16);
  l.remainder = 1;
  Parameter p(l, 3);
  for (int step = 0; step < 4; ++step) {
    p.set_grad(70 + step, 4.0f);
    for (int64_t i = 0; i < kSpan; ++i) p.put_grad(7 * kSpan + i, 0.0f);
    if (step == 2) {
      p.put(1, 5, 0x7f);
      p.put(1, kSpan + 130, 0xff);
      p.put(2, 2 * kSpan + 511, 0x7f);
      p.put(2, 3 * kSpan + 77, 0x91);
      p.put_grad(4 * kSpan + 300, std::numeric_limits<float>::quiet_NaN());
      p.put_grad(5 * kSpan + 2, 3e38f);
      p.put_grad(6 * kSpan + 3, -1e-30f);
    }
    AdamParameter cpu = p.cpu(), cuda = p.cuda();
    int64_t skipped = 0;
    Buffer workspace(cuda::adam_workspace_bytes(&cuda, 1));
    cpu::adam(&cpu, 1, &skipped);
    cuda::adam(&cuda, 1, &skipped, workspace.data(), nullptr);
    CHECK_EQ(skipped, 0);
    p.check();
  }
}

// Every type of weight and gradient beside expanded moments, in a chunk and a part of one.
TEST(expanded_moments_beside_every_type) {
  for (const DType grad : {DType::f32, DType::f16, DType::bf16, DType::e4m3, DType::e5m2})
    for (const DType weight : {DType::f32, DType::bf16, DType::f16}) {
      Layout l = coat({1, weight == DType::f32 ? 16384 + 1024 : 1024}, weight, grad);
      l.scaled = false;
      check({l});
      l.stochastic = weight != DType::f32;
      check({l});
    }
}

TEST(many_parameters_in_one_launch) {
  in_every_order([] {
    check({{{1, 33}, DType::f32, DType::f32, DType::f32, DType::f32},
           o2({130, 144}, DType::bf16),
           {{0, 5}, DType::f32, DType::f32, DType::f32, DType::f32},
           {{1, 20000}, DType::bf16, DType::f32, DType::f32, DType::bf16},
           o2({1, 1}),
           o2({0, 7}),
           {{3, 5}, DType::f16, DType::e4m3, DType::f16, DType::f16}});
  });
}

// A table of several pages, and more parameters than threads.
TEST(very_many_parameters) {
  std::vector<Layout> layouts;
  for (int64_t i = 0; i < 300; ++i) layouts.push_back(o2({i % 4, i % 9}));
  check(layouts);
}

TEST(views_that_are_not_aligned) {
  for (const int64_t skew : {1, 8}) {
    Layout layout = o2({96, 160});
    layout.skew = skew;
    check({layout});
  }
}

TEST(wrong_arguments_are_named) {
  Parameter p(o2({4, 8}), 1);
  AdamParameter a = p.cuda();
  a.grad.cols = 7;
  CHECK_THROWS(cuda::adam(&a, 1, nullptr, nullptr, nullptr),
               "grad has 28 values, its parameter 32");
}

TEST(a_master_needs_a_bf16_weight) {
  Layout layout = coat({4, 8}, DType::f32);
  layout.remainder = 2;
  Parameter p(layout, 1);
  AdamParameter a = p.cuda();
  CHECK_THROWS(cuda::adam(&a, 1, nullptr, nullptr, nullptr),
               "a remainder goes with a bf16 weight, got f32");
}

TEST(a_scale_and_an_amax_come_together_where_the_format_has_them) {
  Parameter low(o2({4, 8}), 1);
  AdamParameter a = low.cuda();
  a.exp_avg_sq.amax = nullptr;
  CHECK_THROWS(cuda::adam(&a, 1, nullptr, nullptr, nullptr),
               "exp_avg_sq is f16 and needs a scale and an amax");
  float one = 1.0f;
  Parameter wide({{4, 8}, DType::f32, DType::f32, DType::f32, DType::f32}, 1);
  AdamParameter b = wide.cuda();
  b.exp_avg.scale = &one;
  CHECK_THROWS(cuda::adam(&b, 1, nullptr, nullptr, nullptr),
               "exp_avg is f32 and takes neither a scale nor an amax");
}
