// The grouped products of the CUDA backend, run on the host and, as test_cuda_grouped_ptx, on the
// interpreter of PTX: compared with f64.
#include "gemm_product.h"
#include "quaver/groups.h"
#include "simt/cases.h"

using namespace quaver;
using namespace quaver::test;

namespace {

struct Formats {
  DType a, b, out;
};

struct GroupedCase {
  std::vector<int64_t> ends;
  int64_t rows;  // S
  int64_t n, k;  // or M and N of a weight
  Formats formats;
  Grain grain_a, grain_b;
  bool valid = true;  // what the ends are; without that nothing is compared
};

// The count of an operand's scales; `span` values have one block of scales each, of `rows` rows in
// `groups`.
int64_t scale_count(Grain grain, int64_t groups, int64_t rows, int64_t blocks) {
  switch (grain) {
    case Grain::tensor: return groups;
    case Grain::row: return rows;
    case Grain::block: return rows * blocks;
    default: return blocks_in_row(rows, kScaleTile) * blocks;
  }
}

// What an element should be, and how far it may be from that: K roundings, and one of the result.
struct Sum {
  double value = 0, magnitude = 0;
  int64_t terms = 0;
  void add(double x) {
    value += x;
    magnitude += std::fabs(x);
    ++terms;
  }
  double bound(DType out) const {
    const double last = out == DType::f32 ? 0x1p-23 : out == DType::f16 ? 0x1p-10 : 0x1p-8;
    return magnitude * double(terms + 4) * 0x1p-23 + std::fabs(value) * last + 1e-7;
  }
};

void compare(const Values& out, const GroupedCase& c, int64_t at, const Sum& sum) {
  const double got = decode_from(out.codes() + at * size_of(c.formats.out), c.formats.out);
  if (!(std::fabs(got - sum.value) <= sum.bound(c.formats.out)))
    fail("element ", at, " is ", got, ", not ", sum.value, " within ", sum.bound(c.formats.out));
}

// Rows of x times the matrices of a stack.
void check_rows(const GroupedCase& c) {
  Generator g;
  const auto groups = int64_t(c.ends.size());
  const int64_t n16 = gemm_padded(c.n), blocks = blocks_in_row(c.k, kScaleTile);
  Values a(&g, c.formats.a, c.rows * c.k), b(&g, c.formats.b, groups * n16 * c.k);
  Values out(&g, c.formats.out, c.rows * c.n);
  const auto scale_a = random_scales(&g, scale_count(c.grain_a, groups, c.rows, blocks));
  const int64_t own = scale_count(c.grain_b, 1, n16, blocks);
  const auto scale_b = random_scales(&g, groups * own);
  GroupedGemm p;
  p.out = {out.codes(), c.formats.out, c.rows, c.n};
  p.a = {a.codes(), c.formats.a, c.rows, c.k};
  p.b = {b.codes(), c.formats.b, groups * n16, c.k};
  p.scale_a = scale_a.data();
  p.scale_b = scale_b.data();
  p.grain_a = c.grain_a;
  p.grain_b = c.grain_b;
  p.ends = c.ends.data();
  p.groups = groups;
  p.n = c.n;
  cuda::grouped_gemm(p, nullptr);
  if (!c.valid) return;
  int64_t group = 0;
  for (int64_t i = 0; i < c.rows; ++i) {
    while (group < groups && c.ends[group] <= i) ++group;
    for (int64_t j = 0; j < c.n; ++j) {
      Sum sum;
      for (int64_t k = 0; group < groups && k < c.k; ++k) {
        const int64_t block = k / kScaleTile;
        const double sa = scale_a[c.grain_a == Grain::tensor ? group
                                  : c.grain_a == Grain::row  ? i
                                                             : i * blocks + block];
        const double sb =
            scale_b[group * own + (c.grain_b == Grain::tensor ? 0
                                   : c.grain_b == Grain::row  ? j
                                                              : j / kScaleTile * blocks + block)];
        sum.add(a.numbers[i * c.k + k] * b.numbers[(group * n16 + j) * c.k + k] * sa * sb);
      }
      compare(out, c, i * c.n + j, sum);
    }
  }
}

// A transposed copy's codes: zeros between a group's rows and the next multiple of 16, and, where
// nothing may be read, whatever there was.
void clear_padding(Values* v, int64_t rows, int64_t width, const std::vector<int64_t>& ends) {
  for (int64_t e = 0, begin = 0; e < int64_t(ends.size()); begin = ends[e++])
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = ends[e] - begin; k < gemm_padded(ends[e] - begin); ++k) {
        const int64_t at = r * width + group_column(begin, e) + k;
        v->codes()[at] = 0;
        v->numbers[at] = 0;
      }
}

// The gradient of each matrix of a stack: c.n rows and c.k columns.
void check_weight(const GroupedCase& c) {
  Generator g;
  const auto groups = int64_t(c.ends.size());
  const int64_t width = group_columns(c.rows, groups), blocks = group_blocks(c.rows, groups);
  const int64_t m16 = gemm_padded(c.n), n16 = gemm_padded(c.k);
  Values a(&g, c.formats.a, m16 * width), b(&g, c.formats.b, n16 * width);
  if (c.valid) {
    clear_padding(&a, m16, width, c.ends);
    clear_padding(&b, n16, width, c.ends);
  }
  Values out(&g, c.formats.out, groups * c.n * c.k);
  const auto count = [&](Grain grain, int64_t rows) {
    return scale_count(grain, groups, rows, blocks) * (grain == Grain::row ? groups : 1);
  };
  const auto scale_a = random_scales(&g, count(c.grain_a, m16));
  const auto scale_b = random_scales(&g, count(c.grain_b, n16));
  GroupedGemm p;
  p.out = {out.codes(), c.formats.out, groups * c.n, c.k};
  p.a = {a.codes(), c.formats.a, m16, width};
  p.b = {b.codes(), c.formats.b, n16, width};
  p.scale_a = scale_a.data();
  p.scale_b = scale_b.data();
  p.grain_a = c.grain_a;
  p.grain_b = c.grain_b;
  p.ends = c.ends.data();
  p.groups = groups;
  p.m = c.n;
  p.n = c.k;
  p.weight = true;
  cuda::grouped_gemm(p, nullptr);
  if (!c.valid) return;
  const auto scale = [&](const std::vector<float>& of, Grain grain, int64_t rows, int64_t group,
                         int64_t row, int64_t block) -> double {
    if (grain == Grain::tensor) return of[group];
    if (grain == Grain::row) return of[group * rows + row];
    return of[(grain == Grain::tile ? row / kScaleTile : row) * blocks + block];
  };
  for (int64_t e = 0, begin = 0; e < groups; begin = c.ends[e++])
    for (int64_t i = 0; i < c.n; ++i)
      for (int64_t j = 0; j < c.k; ++j) {
        Sum sum;
        for (int64_t k = 0; k < c.ends[e] - begin; ++k) {
          const int64_t at = group_column(begin, e) + k;
          const int64_t block = group_block(begin, e) + k / kScaleTile;
          sum.add(a.numbers[i * width + at] * b.numbers[j * width + at] *
                  scale(scale_a, c.grain_a, m16, e, i, block) *
                  scale(scale_b, c.grain_b, n16, e, j, block));
        }
        compare(out, c, (e * c.n + i) * c.k + j, sum);
      }
}

constexpr Formats kForward = {DType::e4m3, DType::e4m3, DType::bf16};
constexpr Formats kBackward = {DType::e5m2, DType::e4m3, DType::f32};
constexpr Formats kFine = {DType::e4m3, DType::e4m3, DType::f32};
constexpr Formats kInputMajor = {DType::e4m3, DType::e5m2, DType::f16};

// Ragged, empty, of one row, one that has all, rows of none, and no row at all.
const std::vector<std::pair<std::vector<int64_t>, int64_t>> kSplits = {{{37, 37, 38, 200}, 200},
                                                                       {{0, 0, 150, 150}, 150},
                                                                       {{1, 2, 3, 4}, 4},
                                                                       {{16, 48, 70}, 90},
                                                                       {{0, 0}, 20},
                                                                       {{64, 128}, 128}};

}  // namespace

TEST(rows_of_every_division) {
  for (const auto& [ends, rows] : kSplits)
    for (const Formats& f : {kForward, kBackward, kFine, kInputMajor})
      check_rows({ends, rows, 72, 80, f, Grain::tensor, Grain::tensor});
}

TEST(rows_with_scales_of_rows_and_blocks) {
  for (const auto& [ends, rows] : kSplits) {
    check_rows({ends, rows, 67, 144, kForward, Grain::row, Grain::row});
    check_rows({ends, rows, 20, 144, kBackward, Grain::tensor, Grain::row});
    check_rows({ends, rows, 136, 272, kForward, Grain::block, Grain::tile});
  }
}

TEST(gradients_of_every_division) {
  for (const auto& [ends, rows] : kSplits)
    for (const Formats& f : {kForward, kBackward, kFine, kInputMajor})
      check_weight({ends, rows, 72, 35, f, Grain::tensor, Grain::tensor});
}

TEST(gradients_with_scales_of_rows_and_blocks) {
  for (const auto& [ends, rows] : kSplits) {
    check_weight({ends, rows, 33, 80, kBackward, Grain::row, Grain::row});
    check_weight({ends, rows, 80, 136, kFine, Grain::block, Grain::tile});
    check_weight({ends, rows, 24, 40, kFine, Grain::block, Grain::block});
    check_weight({ends, rows, 24, 40, kBackward, Grain::block, Grain::block});
    check_weight({ends, rows, 40, 24, kInputMajor, Grain::block, Grain::block});
  }
}

// The interpreter refuses an access outside of the tensors.
TEST(ends_out_of_range_touch_nothing_outside) {
  const int64_t far = int64_t(1) << 40;
  for (const std::vector<int64_t>& ends :
       {std::vector<int64_t>{-5, 1000, 3}, {far, -far, far}, {100, 60, 20}, {0, 101, 101}}) {
    check_rows({ends, 100, 40, 144, kForward, Grain::tensor, Grain::tensor, false});
    check_rows({ends, 100, 40, 144, kForward, Grain::block, Grain::tile, false});
    check_weight({ends, 100, 40, 24, kFine, Grain::tensor, Grain::tensor, false});
    check_weight({ends, 100, 40, 24, kFine, Grain::block, Grain::tile, false});
  }
}

TEST(every_order_of_blocks_and_warps) {
  in_every_order([] {
    check_rows({{5, 70}, 80, 72, 80, kForward, Grain::block, Grain::tile});
    check_weight({{5, 70}, 80, 40, 24, kBackward, Grain::tensor, Grain::tensor});
  });
}

TEST(what_the_kernel_refuses) {
  const auto refused = [](Formats f, Grain a, Grain b) {
    check_rows({{3, 4}, 4, 16, 16, f, a, b});
  };
  CHECK_THROWS(refused({DType::e5m2, DType::e5m2, DType::f32}, Grain::tensor, Grain::tensor),
               "e5m2 x e5m2 has no CUDA kernel");
  CHECK_THROWS(refused(kForward, Grain::block, Grain::row), "go with blocks or tiles");
  CHECK_THROWS(refused(kForward, Grain::tile, Grain::tile), "a has tiles");
}
