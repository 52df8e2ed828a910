// grad_norm and accumulate of the CUDA backend, run on the host: the bits of the CPU backend.
#include "quaver/grad.h"
#include "simt/cases.h"

using namespace quaver;
using namespace quaver::test;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Gradients {
  std::vector<Buffer> buffers;
  std::vector<float> scales, amaxes;
  std::vector<ScaledView> views;

  // Every type in turn; every third one without a scale, every second one without an amax.
  explicit Gradients(const std::vector<int64_t>& sizes, int64_t skew = 0)
      : scales(sizes.size()), amaxes(sizes.size(), 1.0f), views(sizes.size()) {
    constexpr DType types[] = {DType::e4m3, DType::bf16, DType::f32, DType::e5m2, DType::f16};
    for (size_t i = 0; i < sizes.size(); ++i) {
      const DType type = types[i % 5];
      buffers.emplace_back(sizes[i] * size_of(type), skew * size_of(type));
      fill(&buffers[i], type, sizes[i], 31 + i);
      scales[i] = (i % 4 == 1 ? -0.01f : 0.01f) * float(i + 1);
    }
    for (size_t i = 0; i < sizes.size(); ++i) {
      views[i].values = view(buffers[i], types[i % 5], 1, sizes[i]);
      views[i].scale = i % 3 == 2 ? nullptr : &scales[i];
      views[i].amax = i % 2 == 1 ? nullptr : &amaxes[i];
    }
  }
};

bool same(float a, float b) {
  return (a != a && b != b) || bit_cast<uint32_t>(a) == bit_cast<uint32_t>(b);
}

void check(const Gradients& g) {
  const auto count = static_cast<int64_t>(g.views.size());
  float norm = -1.0f, cuda_norm = -2.0f;
  std::vector<float> amax(count, -1.0f), cuda_amax(count, -2.0f);
  Buffer workspace(cuda::grad_norm_workspace_bytes(g.views.data(), count));
  cpu::grad_norm(&norm, amax.data(), g.views.data(), count);
  cuda::grad_norm(&cuda_norm, cuda_amax.data(), g.views.data(), count, workspace.data(), nullptr);
  if (!same(norm, cuda_norm)) CHECK_EQ(norm, cuda_norm);
  for (int64_t i = 0; i < count; ++i)
    if (!same(amax[i], cuda_amax[i])) CHECK_EQ(amax[i], cuda_amax[i]);
  CHECK(workspace.guards_hold());
}

void check_accumulate(DType type, DType other_type, int64_t n, int64_t skew, float bad_amax) {
  Buffer target(n * size_of(type), skew * size_of(type)), other(n * size_of(other_type));
  fill(&target, type, n, 41);
  fill(&other, other_type, n, 43);
  Buffer copy(n * size_of(type));
  if (n > 0) std::memcpy(copy.data(), target.data(), n * size_of(type));
  std::vector<float> scale(1, 0.125f), amax(1, 3.0f), cuda_scale = scale, cuda_amax = amax;
  const float other_scale = 0.5f;
  ScaledView b{view(other, other_type, 1, n), &other_scale, &bad_amax};
  Buffer workspace(cuda::kAccumulateWorkspaceBytes);
  cpu::accumulate(view(copy, type, 1, n), scale.data(), amax.data(), b);
  cuda::accumulate(view(target, type, 1, n), cuda_scale.data(), cuda_amax.data(), b,
                   workspace.data(), nullptr);
  CHECK(copy.bytes() == target.bytes());
  CHECK(same_bits(scale, cuda_scale));
  CHECK(same(amax[0], cuda_amax[0]));
  CHECK(target.guards_hold() && workspace.guards_hold());
}

}  // namespace

TEST(norm_of_one_gradient) {
  for (const int64_t n : {int64_t(0), int64_t(1), int64_t(15), int64_t(513), kNormPiece - 1,
                          kNormPiece, kNormPiece + 1, 5 * kNormPiece + 77})
    check(Gradients({n}));
}

TEST(norm_of_many_gradients) {
  in_every_order([] {
    check(Gradients({0, 5, 0, 0, kNormPiece, 3, 2 * kNormPiece + 9, 0}));
    check(Gradients({kNormPiece + 1, 100, 65, 1, 7777}, 3));
  });
}

// Squares of which the first four sum to that of 1 + 2^-24, halfway between two f32. Six of 2^-54
// in the 16 lanes of another thread move it if they are added to each other first, as grad.h says;
// to the large sum each alone, or five of them, are lost.
TEST(norm_that_its_order_decides) {
  Gradients g({0, 0, 300});
  float* x = g.buffers[2].as<float>();
  std::memset(x, 0, 300 * sizeof(float));
  x[0] = 1.0f;
  x[1] = x[2] = 0x1p-12f;
  x[3] = 0x1p-24f;
  for (int i = 256; i < 262; ++i) x[i] = 0x1p-27f;
  check(g);
  float norm = 0.0f;
  std::vector<float> amax(3);
  cpu::grad_norm(&norm, amax.data(), g.views.data(), 3);
  CHECK_EQ(norm, 1.0f + 0x1p-23f);
}

// More pieces than strands, and a table of more than one page.
TEST(norm_of_very_many_gradients) {
  std::vector<int64_t> sizes(700);
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = static_cast<int64_t>(i % 40);
  check(Gradients(sizes));
}

TEST(norm_that_is_not_finite) {
  for (const float bad : {kNan, std::numeric_limits<float>::infinity()}) {
    Gradients carried({40, 50, 60});
    carried.amaxes[2] = bad;
    check(carried);
    Gradients stored({40, 50, 60});
    stored.buffers[2].as<float>()[7] = bad;
    check(stored);
  }
}

TEST(accumulate_every_type) {
  for (const DType type : {DType::e4m3, DType::e5m2, DType::bf16})
    for (const DType other : {DType::e4m3, DType::e5m2, DType::f16, DType::bf16, DType::f32})
      for (const int64_t n : {0, 1, 63, 4097}) check_accumulate(type, other, n, 0, 2.0f);
}

TEST(accumulate_orders_and_odd_views) {
  in_every_order([] { check_accumulate(DType::e4m3, DType::bf16, 40000, 0, 2.0f); });
  check_accumulate(DType::e4m3, DType::bf16, 4100, 5, 2.0f);
}

TEST(accumulate_shows_what_is_not_finite) {
  check_accumulate(DType::e4m3, DType::e4m3, 100, 0, kNan);
  check_accumulate(DType::bf16, DType::bf16, 100, 0, std::numeric_limits<float>::infinity());
}

TEST(wrong_arguments_are_named) {
  Buffer a(8), b(8);
  float scale = 1.0f, amax = 1.0f;
  CHECK_THROWS(cuda::accumulate(view(a, DType::f32, 1, 2), &scale, &amax,
                                {view(b, DType::f32, 1, 2)}, nullptr, nullptr),
               "target must be e4m3, e5m2 or bf16, got f32");
}
