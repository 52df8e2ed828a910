// adam_4bit_ of the CUDA backend, run on the host: the bits of the CPU backend, step after step.
// And the codes against their definition.
#include <cmath>

#include "quaver/adam4.h"
#include "simt/cases.h"

using namespace quaver;
using namespace quaver::test;

namespace {

struct Layout {
  std::vector<int64_t> shape;
  Second second = Second::rank1;
  DType weight = DType::f32, grad = DType::f32;
  int remainder = 0;  // bytes of an element, of a bf16 weight
  bool stochastic = false;
  int64_t skew = 0;  // elements of weight and gradient, bytes of the codes

  int64_t numel() const {
    int64_t n = 1;
    for (const int64_t size : shape) n *= size;
    return n;
  }
  quaver::Shape axes() const {
    quaver::Shape s;
    if (second == Second::block) return s;
    s.axes = static_cast<int>(shape.size());
    for (int k = 0; k < s.axes; ++k) s.size[k] = shape[static_cast<size_t>(k)];
    return s;
  }
};

// One parameter's memory for a backend.
class Copy {
 public:
  Copy(const Layout& l, uint64_t seed)
      : l_(l),
        n_(l.numel()),
        weight(n_ * size_of(l.weight), l.skew * size_of(l.weight)),
        grad(n_ * size_of(l.grad), l.skew * size_of(l.grad)),
        remainder(n_ * l.remainder, l.skew * l.remainder),
        first((n_ + 1) / 2, l.skew),
        first_scale(group_count(n_) * 4),
        second(l.second == Second::factor ? 0 : (n_ + 1) / 2, l.skew),
        second_scale(second_scale_count(l.second, l.axes(), n_) * 4) {
    fill(&weight, l.weight, n_, seed);
    for (Buffer* zero : {&remainder, &first, &first_scale, &second, &second_scale})
      for (int64_t i = 0; i < zero->size(); ++i) zero->data()[i] = 0;
    for (int64_t i = 0; l.second == Second::factor && i < second_scale.size() / 4; ++i)
      second_scale.as<float>()[i] = 0.25f + 0.5f * static_cast<float>(i % 7);
  }

  void set_grad(uint64_t seed, float amax, bool zero) {
    fill(&grad, l_.grad, n_, seed);
    for (int64_t i = 0; zero && i < grad.size(); ++i) grad.data()[i] = 0;
    grad_amax = amax;
  }

  Adam4Parameter parameter() {
    Adam4Parameter p;
    p.weight = view(weight, l_.weight, 1, n_);
    p.grad = view(grad, l_.grad, 1, n_);
    p.grad_scale = is_fp8(l_.grad) ? &grad_scale : nullptr;
    p.grad_amax = &grad_amax;
    p.exp_avg = first.data();
    p.exp_avg_scale = first_scale.as<float>();
    p.exp_avg_sq = l_.second == Second::factor ? nullptr : second.data();
    p.exp_avg_sq_scale = second_scale.as<float>();
    p.second = l_.second;
    p.shape = l_.axes();
    if (l_.remainder > 0) p.remainder = {remainder.data(), l_.remainder};
    p.stochastic = l_.stochastic;
    p.seed = 17;
    p.step = &step;
    p.hyper = hyper;
    return p;
  }

  std::vector<Buffer*> written() {
    return {&weight, &remainder, &first, &first_scale, &second, &second_scale};
  }

 private:
  Layout l_;
  int64_t n_;
  float grad_amax = 1.0f, grad_scale = 0.5f;
  double hyper[5] = {1e-2, 0.9, 0.999, 1e-8, 0.1};

 public:
  Buffer weight, grad, remainder, first, first_scale, second, second_scale;
  int64_t step = 0;
};

// Steps of which the second is skipped, because one gradient is not finite, and the third has
// gradients of 0.
void check(const std::vector<Layout>& layouts, int steps = 5) {
  std::vector<Copy> cpu, cuda;
  for (size_t i = 0; i < layouts.size(); ++i)
    for (std::vector<Copy>* copies : {&cpu, &cuda}) copies->emplace_back(layouts[i], 50 + i);
  const auto count = static_cast<int64_t>(layouts.size());
  int64_t skipped = 0, cuda_skipped = 0;
  for (int step = 0; step < steps; ++step) {
    std::vector<Adam4Parameter> here, there;
    for (size_t i = 0; i < layouts.size(); ++i) {
      const bool bad = step == 1 && i + 1 == layouts.size();
      for (std::vector<Copy>* copies : {&cpu, &cuda})
        (*copies)[i].set_grad(1000 * static_cast<uint64_t>(step) + i,
                              bad ? std::numeric_limits<float>::infinity() : 4.0f, step == 2);
      here.push_back(cpu[i].parameter());
      there.push_back(cuda[i].parameter());
    }
    Buffer workspace(cuda::adam4_workspace_bytes(there.data(), count));
    cpu::adam4(here.data(), count, &skipped);
    cuda::adam4(there.data(), count, &cuda_skipped, workspace.data(), nullptr);
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

// The last rows are of panels: two of them, of each width, whole and cut, and of several matrices.
const std::vector<std::vector<int64_t>> kEveryShape = {
    {1, 1},          {7, 9},     {63, 65},   {3, 2000},  {2000, 3},  {5, 4096},    {6, 7, 3, 3},
    {2, 3, 4, 5, 6}, {70, 1024}, {256, 256}, {130, 768}, {258, 384}, {3, 67, 128}, {2, 2, 3, 640}};

}  // namespace

TEST(every_shape_and_second_moment) {
  for (const Second second : {Second::block, Second::rank1, Second::factor})
    for (const auto& shape : kEveryShape) check({Layout{shape, second}});
}

TEST(every_size_of_a_vector) {
  for (const int64_t n : {1, 2, 15, 16, 17, 127, 128, 129, 4095, 4096, 4097, 12345})
    check({Layout{{n}, Second::block}});
}

TEST(every_type) {
  for (const DType weight : {DType::f32, DType::bf16, DType::f16})
    for (const DType grad : {DType::f32, DType::bf16, DType::f16, DType::e4m3, DType::e5m2})
      for (const bool stochastic : {false, true}) {
        Layout l = {{41, 100}};
        l.weight = weight;
        l.grad = grad;
        l.stochastic = stochastic && weight != DType::f32;
        check({l});
      }
}

TEST(masters_of_bf16_weights_and_views_that_are_not_aligned) {
  for (const int64_t skew : {0, 1})
    for (const Second second : {Second::block, Second::rank1}) {
      Layout l = {{91, 99}, second};
      l.weight = DType::bf16;
      l.skew = skew;
      for (l.remainder = 1; l.remainder <= 2; ++l.remainder) check({l});
    }
}

TEST(many_parameters_in_one_launch) {
  in_every_order([] {
    check({{{33, 5}},
           {{90, 100}, Second::block},
           {{0, 4}},
           {{50, 100}, Second::factor},
           {{7}, Second::block}},
          3);
  });
}

TEST(very_many_parameters) {
  std::vector<Layout> layouts;
  for (int64_t i = 0; i < 300; ++i)
    layouts.push_back({{i % 40, 3}, i % 2 ? Second::rank1 : Second::block});
  check(layouts, 2);
}

TEST(a_code_is_the_nearest_and_a_tie_goes_up) {
  for (uint32_t code = 0; code < 16; ++code) {
    CHECK_EQ(encode_dynamic4(decode_dynamic4(code)), code);
    CHECK_EQ(encode_linear4(decode_linear4(code)), code);
    if (code == 0) continue;
    for (const bool dynamic : {true, false}) {
      const float low = dynamic ? decode_dynamic4(code - 1) : decode_linear4(code - 1);
      const float high = dynamic ? decode_dynamic4(code) : decode_linear4(code);
      const float middle = (low + high) / 2.0f, below = std::nextafter(middle, -2.0f);
      CHECK_EQ(dynamic ? encode_dynamic4(middle) : encode_linear4(middle), code);
      CHECK_EQ(dynamic ? encode_dynamic4(below) : encode_linear4(below), code - 1);
    }
  }
  CHECK_EQ(encode_dynamic4(-1.0f), 0u);
  CHECK_EQ(encode_dynamic4(-0.0f), kDynamicZero);
  CHECK_EQ(encode_linear4(0.0f), 0u);
}

TEST(wrong_arguments_are_named) {
  Copy copy({{50, 100}}, 1);
  Adam4Parameter p = copy.parameter();
  p.shape.axes = 1;
  CHECK_THROWS(cuda::adam4(&p, 1, nullptr, nullptr, nullptr), "needs 2 axes or more");
  p = copy.parameter();
  p.exp_avg_sq = nullptr;
  CHECK_THROWS(cuda::adam4(&p, 1, nullptr, nullptr, nullptr), "has codes, unless it is factored");
  p = copy.parameter();
  p.stochastic = true;
  CHECK_THROWS(cuda::adam4(&p, 1, nullptr, nullptr, nullptr), "a seed goes with a bf16");
}
