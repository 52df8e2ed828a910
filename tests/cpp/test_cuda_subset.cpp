// subset_sums of the CUDA backend, run on the host: the bits of the CPU backend.
#include "quaver/subset.h"
#include "simt/cases.h"

using namespace quaver;
using namespace quaver::test;

namespace {

struct Case {
  int64_t numel;
  Subsets subsets;
};

constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16, DType::e4m3, DType::e5m2};

bool same(float a, float b) {
  return (a != a && b != b) || bit_cast<uint32_t>(a) == bit_cast<uint32_t>(b);
}

// All cases in one call, their types in turn from `turn` on; some with a scale and an amax.
void check(const std::vector<Case>& cases, size_t turn = 0, int64_t skew = 0, float carried = 1.0f,
           float value = 0.0f, float scale = -0.375f) {
  const auto count = static_cast<int64_t>(cases.size());
  std::vector<Buffer> grads, sums[2];
  for (size_t i = 0; i < cases.size(); ++i) {
    const DType type = kTypes[(turn + i) % 5];
    grads.emplace_back(cases[i].numel * size_of(type), skew * size_of(type));
    fill(&grads[i], type, cases[i].numel, 7 + i);
    if (value != 0.0f && type == DType::f32) grads[i].as<float>()[cases[i].numel / 2] = value;
    for (auto& of : sums) of.emplace_back(subset_count(cases[i].subsets, cases[i].numel) * 4);
  }
  std::vector<SubsetGrad> list[2];
  for (int backend = 0; backend < 2; ++backend)
    for (size_t i = 0; i < cases.size(); ++i) {
      ScaledView g{view(grads[i], kTypes[(turn + i) % 5], 1, cases[i].numel)};
      g.scale = i % 2 == 1 ? &scale : nullptr;
      g.amax = i % 3 == 1 ? &carried : nullptr;
      list[backend].push_back({g, cases[i].subsets, sums[backend][i].as<float>()});
    }
  std::vector<float> amax(count, -1.0f), cuda_amax(count, -2.0f);
  Buffer workspace(cuda::subset_sums_workspace_bytes(list[1].data(), count));
  cpu::subset_sums(amax.data(), list[0].data(), count);
  cuda::subset_sums(cuda_amax.data(), list[1].data(), count, workspace.data(), nullptr);
  CHECK(workspace.guards_hold());
  for (size_t i = 0; i < cases.size(); ++i) {
    CHECK(same(amax[i], cuda_amax[i]));
    CHECK(sums[1][i].guards_hold());
    for (int64_t k = 0; k < sums[0][i].size() / 4; ++k)
      CHECK(same(sums[0][i].as<float>()[k], sums[1][i].as<float>()[k]));
  }
}

}  // namespace

TEST(rows_columns_and_none_of_every_shape) {
  for (size_t turn = 0; turn < 5; ++turn) {
    std::vector<Case> cases;
    for (const Shape& s : kShapes) {
      const int64_t n = s.rows * s.cols;
      cases.push_back({n, {0, false}});
      if (s.cols > 0) cases.push_back({n, {s.cols, false}});
      if (s.cols > 0) cases.push_back({n, {s.cols, true}});
    }
    check(cases, turn);
  }
}

TEST(runs_of_every_length) {
  for (const int64_t width : {1, 2, 7, 31, 32, 33, 255, 4097})
    for (const int64_t n : {1, 6, 31, 257, 4096, 9001}) check({{n, {width, false}}});
}

// A subset of several pieces, the last of them short, and one that is all of the tensor.
TEST(subsets_of_several_pieces) {
  constexpr int64_t piece = kSubsetPiece;
  for (const int64_t n : {piece - 1, piece, piece + 1, 3 * piece + 5})
    check({{n, {piece + 1, false}}, {n, {2 * piece, false}}, {n, {INT64_MAX, false}}, {n, {}}});
  in_every_order([] {
    check({{40000, {17000, false}}, {0, {5, true}}, {700, {7, true}}, {33000, {33000, false}}});
  });
}

TEST(columns_of_several_pieces) {
  for (const int64_t rows : {127, 128, 129, 300})
    for (const int64_t width : {1, 7, 257})
      in_every_order([&] { check({{rows * width, {width, true}}, {9, {3, true}}}); });
}

TEST(views_that_are_not_aligned) {
  for (size_t turn = 0; turn < 5; ++turn)
    for (const int64_t skew : {1, 3})
      check({{3000, {100, false}}, {3000, {100, true}}}, turn, skew);
}

TEST(what_is_not_finite_shows_in_the_amax) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  const std::vector<Case> cases = {{500, {10, false}}, {500, {10, true}}, {500, {}}, {0, {}}};
  for (const float value : {inf, -inf, std::numeric_limits<float>::quiet_NaN(), 1e30f})
    for (size_t turn : {0, 4}) check(cases, turn, 0, 1.0f, value);
  check(cases, 0, 0, inf);
  // Times infinity a zero is NaN and other values are not, so neither may decide.
  for (const float scale : {inf, std::numeric_limits<float>::quiet_NaN()})
    for (size_t turn = 0; turn < 5; ++turn) check(cases, turn, 0, 1.0f, 0.0f, scale);
}

// A table of several pages, and more gradients than threads.
TEST(very_many_gradients) {
  std::vector<Case> cases;
  for (int64_t i = 0; i < 300; ++i)
    cases.push_back({i % 40 * 6, {i % 4 + 1, i % 2 == 1 && i % 4 < 3}});
  check(cases);
}

TEST(wrong_arguments_are_named) {
  Buffer values(40);
  SubsetGrad g{{view(values, DType::f32, 1, 10)}, {3, true}, values.as<float>()};
  CHECK_THROWS(cpu::subset_sums(nullptr, &g, 1), "minus a divisor of the 10 elements, got -3");
  CHECK_THROWS(cuda::subset_sums(nullptr, &g, 1, nullptr, nullptr), "minus a divisor");
  g = {{view(values, DType::f32, 1, 10)}, {3, false}, nullptr};
  CHECK_THROWS(cpu::subset_sums(nullptr, &g, 1), "sums are needed");
}
