// micro_adam of the CUDA backend, run on the host: the bits of the CPU backend, step after step.
#include "quaver/microadam.h"
#include "simt/cases.h"

using namespace quaver;
using namespace quaver::test;

namespace {

struct Layout {
  int64_t n;
  DType weight = DType::f32, grad = DType::f32;
  int64_t kept = 41, window = 3, error_block = 64;
  double alpha = 0.0;
  int remainder = 0;  // bytes of an element, of a bf16 weight
  bool stochastic = false;
  int64_t skew = 0;    // elements of weight and gradient, bytes of the errors
  bool equal = false;  // gradients of one magnitude: ties
};

// One parameter's memory for a backend.
class Copy {
 public:
  Copy(const Layout& l, uint64_t seed)
      : l_(l),
        row_(row(l)),
        weight(l.n * size_of(l.weight), l.skew * size_of(l.weight)),
        grad(l.n * size_of(l.grad), l.skew * size_of(l.grad)),
        remainder(l.n * l.remainder, l.skew * l.remainder),
        index(l.window * row_ * 2),
        value(l.window * row_ * 2),
        error((l.n + 1) / 2, l.skew),
        range(4 * error_block_count(l.n, l.error_block)) {
    fill(&weight, l.weight, l.n, seed);
    for (Buffer* zero : {&remainder, &index, &value, &error, &range})
      for (int64_t i = 0; i < zero->size(); ++i) zero->data()[i] = 0;
    hyper[4] = l.n % 2 == 0 ? 0.1 : 0.0;
    hyper[5] = l.alpha;
  }

  void set_grad(uint64_t seed, float amax) {
    fill(&grad, l_.grad, l_.n, seed);
    for (int64_t i = 0; l_.equal && i < l_.n; ++i) grad.as<float>()[i] = i % 3 == 0 ? -2.0f : 2.0f;
    grad_amax = amax;
  }

  MicroAdamParameter parameter() {
    MicroAdamParameter p;
    p.weight = view(weight, l_.weight, 1, l_.n);
    p.grad = view(grad, l_.grad, 1, l_.n);
    p.grad_scale = is_fp8(l_.grad) ? &grad_scale : nullptr;
    p.grad_amax = &grad_amax;
    p.index = index.as<int16_t>();
    p.value = value.as<bf16>();
    p.window = l_.window;
    p.row = row_;
    p.kept = l_.n >= kTopBlock ? l_.kept : 0;
    p.error = error.data();
    p.range = range.as<bf16>();
    p.error_block = l_.error_block;
    if (l_.remainder > 0) p.remainder = {remainder.data(), l_.remainder};
    p.stochastic = l_.stochastic;
    p.seed = 17;
    p.step = &step;
    p.hyper = hyper;
    return p;
  }

  std::vector<Buffer*> written() { return {&weight, &remainder, &index, &value, &error, &range}; }

 private:
  static int64_t row(const Layout& l) {
    const int64_t rest = l.n % kTopBlock;
    return l.n / kTopBlock * l.kept + (rest * l.kept + kTopBlock - 1) / kTopBlock;
  }

  Layout l_;
  int64_t row_;
  float grad_amax = 1.0f, grad_scale = 0.5f;
  double hyper[kMicroHyper] = {1e-2, 0.9, 0.999, 1e-8, 0.1, 0.0};

 public:
  Buffer weight, grad, remainder, index, value, error, range;
  int64_t step = 0;
};

// Steps of which the second is skipped: one gradient is not finite.
void check(const std::vector<Layout>& layouts, int steps = 5) {
  std::vector<Copy> cpu, cuda;
  for (size_t i = 0; i < layouts.size(); ++i)
    for (std::vector<Copy>* copies : {&cpu, &cuda}) copies->emplace_back(layouts[i], 50 + i);
  const auto count = static_cast<int64_t>(layouts.size());
  int64_t skipped = 0, cuda_skipped = 0;
  for (int step = 0; step < steps; ++step) {
    std::vector<MicroAdamParameter> here, there;
    for (size_t i = 0; i < layouts.size(); ++i) {
      const bool bad = step == 1 && i + 1 == layouts.size();
      for (std::vector<Copy>* copies : {&cpu, &cuda})
        (*copies)[i].set_grad(1000 * static_cast<uint64_t>(step) + i,
                              bad ? std::numeric_limits<float>::infinity() : 4.0f);
      here.push_back(cpu[i].parameter());
      there.push_back(cuda[i].parameter());
    }
    Buffer workspace(cuda::micro_adam_workspace_bytes(there.data(), count));
    cpu::micro_adam(here.data(), count, &skipped);
    cuda::micro_adam(there.data(), count, &cuda_skipped, workspace.data(), nullptr);
    CHECK(workspace.guards_hold());
    for (size_t i = 0; i < layouts.size(); ++i) {
      const auto wanted = cpu[i].written(), got = cuda[i].written();
      for (size_t k = 0; k < wanted.size(); ++k) {
        CHECK(wanted[k]->bytes() == got[k]->bytes());
        CHECK(wanted[k]->guards_hold() && got[k]->guards_hold());
      }
      CHECK_EQ(cpu[i].step, cuda[i].step);
    }
  }
  CHECK_EQ(skipped, 1);
  CHECK_EQ(cuda_skipped, 1);
}

Layout of(int64_t n, int64_t error_block = 64, int64_t kept = 41) {
  Layout l = {n};
  l.error_block = error_block;
  l.kept = kept;
  return l;
}

}  // namespace

TEST(every_size) {
  for (const int64_t n : {1, 2, 15, 16, 17, 63, 65, 100, 4095, 4096, 4097, 8192, 12345}) {
    check({of(n)});
    check({of(n, 16, 4096)});
  }
}

TEST(every_error_block) {
  for (const int64_t block : {16, 32, 128, 512, 1024, 4096, 4112, 6000, 8192, 100000})
    for (const int64_t n : {100, 4096, 20001}) check({of(n, block)});
}

TEST(every_type) {
  for (const DType weight : {DType::f32, DType::bf16, DType::f16})
    for (const DType grad : {DType::f32, DType::bf16, DType::f16, DType::e4m3, DType::e5m2})
      for (const bool stochastic : {false, true}) {
        Layout l = of(4100);
        l.weight = weight;
        l.grad = grad;
        l.stochastic = stochastic && weight != DType::f32;
        l.alpha = stochastic ? 0.25 : 0.0;
        check({l});
      }
}

TEST(masters_of_bf16_weights_and_views_that_are_not_aligned) {
  for (const int64_t skew : {0, 1})
    for (const int64_t block : {64, 5008}) {
      Layout l = of(9001, block);
      l.weight = DType::bf16;
      l.skew = skew;
      for (l.remainder = 1; l.remainder <= 2; ++l.remainder) check({l});
    }
}

TEST(ties_and_windows) {
  for (const int64_t kept : {1, 41, 1000, 4095}) {
    Layout l = of(5000, 64, kept);
    l.equal = true;
    l.window = 1;
    check({l});
    l.window = 7;
    check({l}, 9);
  }
}

TEST(many_parameters_in_one_launch) {
  in_every_order(
      [] { check({of(33), of(9000, 4112), of(0), of(5000, 1024, 400), of(7, 100000)}, 3); });
}

TEST(very_many_parameters) {
  std::vector<Layout> layouts;
  for (int64_t i = 0; i < 300; ++i) layouts.push_back(of(i % 40, i % 2 ? 64 : 4112));
  check(layouts, 2);
}

TEST(wrong_arguments_are_named) {
  Copy copy(of(5000), 1);
  MicroAdamParameter p = copy.parameter();
  p.row = 41;
  CHECK_THROWS(cuda::micro_adam(&p, 1, nullptr, nullptr, nullptr), "1 to 904 of the rest");
  p = copy.parameter();
  p.error_block = 48;
  CHECK_THROWS(cuda::micro_adam(&p, 1, nullptr, nullptr, nullptr), "error_block must be a power");
  p = copy.parameter();
  p.window = 0;
  CHECK_THROWS(cuda::micro_adam(&p, 1, nullptr, nullptr, nullptr), "a window must have 1 row");
  p = copy.parameter();
  p.stochastic = true;
  CHECK_THROWS(cuda::micro_adam(&p, 1, nullptr, nullptr, nullptr), "a seed goes with a bf16");
}
