// The grouped casts of the CUDA backend, run on the host and, as test_cuda_cast_groups_ptx, on the
// interpreter of PTX: the bits of the CPU's casts of one group after the other.
#include "quaver/cast_layouts.h"
#include "quaver/groups.h"
#include "simt/layouts.h"

using namespace quaver;
using namespace quaver::test;

namespace {

struct Case {
  std::vector<int64_t> ends;  // or, of a stack, empty
  int64_t rows, cols;         // of x, or of each matrix
  Grain grain;
  DType from = DType::bf16, to = DType::e4m3;
  bool power_of_two = false, tiles_t = false;
  int64_t stack = -1;  // matrices
  std::vector<float> given = {};
  int which = 3;
  float odd = 1;
  int64_t skew = 0;
  bool valid = true;  // what the ends are; without that nothing is compared

  bool stacked() const { return stack >= 0; }
  int64_t groups() const { return stacked() ? stack : int64_t(ends.size()); }
  Layout layout() const { return {grain, kScaleTile}; }
  Layout layout_t() const { return {tiles_t ? Grain::tile : grain, kScaleTile}; }
};

// The results of one backend.
struct Results {
  int64_t rows, cols, columns;  // of q and qt, or of each matrix
  int64_t scales, scales_t;     // of all, or of each matrix
  Buffer q, qt, scale, scale_t;

  Results(const Case& c, unsigned char pattern)
      : rows(c.stacked() ? gemm_padded(c.rows) : c.rows),
        cols(gemm_padded(c.cols)),
        columns(c.stacked() ? rows : group_columns(c.rows, c.groups())),
        scales(c.layout().scale_count({nullptr, DType::f32, rows, cols})),
        scales_t(count_t(c)),
        q((c.which & 1) * matrices(c) * rows * cols, c.skew, pattern),
        qt((c.which >> 1) * matrices(c) * cols * columns, c.skew, pattern),
        scale(4 * (c.grain == Grain::tensor ? c.groups() : (c.which & 1) * matrices(c) * scales), 0,
              pattern),
        scale_t(4 * (c.grain == Grain::tensor ? 0 : (c.which >> 1) * matrices(c) * scales_t), 0,
                pattern) {}

  static int64_t matrices(const Case& c) { return c.stacked() ? c.groups() : 1; }
  int64_t count_t(const Case& c) const {
    if (c.stacked()) return c.layout().scale_count({nullptr, DType::f32, cols, rows});
    if (c.grain == Grain::row) return c.groups() * cols;
    return c.layout_t().scale_rows(cols) * group_blocks(c.rows, c.groups());
  }
  GroupedCast arguments(const Case& c, Buffer& x) {
    static char nothing[16];
    const auto data = [](Buffer& b) { return b.size() == 0 ? (void*)nothing : (void*)b.data(); };
    GroupedCast a;
    const int64_t all = matrices(c);
    a.x = {x.data(), c.from, all * c.rows, c.cols};
    a.q = {c.which & 1 ? data(q) : nullptr, c.to, all * rows, cols};
    a.qt = {c.which & 2 ? data(qt) : nullptr, c.to, all * cols, columns};
    a.scale = scale.as<float>();
    a.scale_t = scale_t.as<float>();
    a.grain = c.grain;
    a.power_of_two = c.power_of_two || c.grain == Grain::tensor;
    a.tiles_t = c.tiles_t;
    a.given = !c.given.empty();
    a.stack = c.stacked();
    a.ends = c.ends.data();
    a.groups = c.groups();
    return a;
  }
};

// One matrix in both layouts, as the CPU casts it.
struct Matrix {
  int64_t rows, cols;
  std::vector<unsigned char> q, qt;
  std::vector<float> scale, scale_t;

  Matrix(const Case& c, Buffer& x, int64_t first, int64_t r, const float* given)
      : rows(gemm_padded(r)),
        cols(gemm_padded(c.cols)),
        q(rows * cols + 1),  // never null, which means not wanted
        qt(rows * cols + 1),
        scale(c.layout().scale_count({nullptr, DType::f32, rows, cols})),
        scale_t(c.layout_t().scale_count({nullptr, DType::f32, cols, rows})) {
    unsigned char* from = x.data() + first * c.cols * size_of(c.from);
    const TensorView codes = {q.data(), c.to, rows, cols}, codes_t = {qt.data(), c.to, cols, rows};
    if (c.grain == Grain::tensor) {
      cast_whole(c, from, r, codes, codes_t, given);
      return;
    }
    LayoutsCast to;
    to.grain = c.grain;
    to.power_of_two = c.power_of_two;
    to.tiles_t = c.tiles_t;
    to.q = {codes, view(scale)};
    to.qt = {codes_t, view(scale_t)};
    cpu::cast_layouts(to, {from, c.from, r, c.cols});
  }

 private:
  void cast_whole(const Case& c, const unsigned char* from, int64_t r, const TensorView& codes,
                  const TensorView& codes_t, const float* given) {
    const int64_t size = size_of(c.from);
    std::vector<unsigned char> padded(rows * cols * size);
    for (int64_t i = 0; i < r && c.cols > 0; ++i)
      std::memcpy(padded.data() + i * cols * size, from + i * c.cols * size, c.cols * size);
    ScaleSource source;
    source.given = given != nullptr;
    source.spread_nan = true;
    if (given != nullptr) scale[0] = *given;
    std::vector<float> amax(1);
    cpu::cast_transpose(codes, codes_t, view(scale), view(amax),
                        {padded.data(), c.from, rows, cols}, true, source);
  }
};

void copy(void* to, int64_t at, int64_t width, const void* from, int64_t rows, int64_t cols,
          int64_t from_width, int64_t size) {
  for (int64_t r = 0; r < rows && cols > 0; ++r)
    std::memcpy(static_cast<char*>(to) + (at + r * width) * size,
                static_cast<const char*>(from) + r * from_width * size, cols * size);
}

void put_matrix(const Case& c, Results& to, const Matrix& m, int64_t e) {
  const auto put = [&](Buffer& b, const void* from, int64_t count, int64_t size) {
    if (b.size() > 0) copy(b.data(), e * count, 0, from, 1, count, 0, size);
  };
  put(to.q, m.q.data(), to.rows * to.cols, 1);
  put(to.qt, m.qt.data(), to.rows * to.cols, 1);
  put(to.scale, m.scale.data(), to.scales, 4);
  if (c.grain != Grain::tensor) put(to.scale_t, m.scale_t.data(), to.scales_t, 4);
}

void put_group(const Case& c, Results& to, const Matrix& m, int64_t e, int64_t begin,
               int64_t rows) {
  const int64_t per_row = c.grain == Grain::block ? blocks_in_row(m.cols, kScaleTile) : 1,
                blocks = group_blocks(c.rows, c.groups());
  if (c.which & 1) copy(to.q.data(), begin * m.cols, m.cols, m.q.data(), rows, m.cols, m.cols, 1);
  if (c.grain == Grain::tensor)
    to.scale.as<float>()[e] = m.scale[0];
  else if (c.which & 1)
    copy(to.scale.data(), begin * per_row, per_row, m.scale.data(), rows, per_row, per_row, 4);
  if (!(c.which & 2)) return;
  copy(to.qt.data(), group_column(begin, e), to.columns, m.qt.data(), m.cols, m.rows, m.rows, 1);
  const int64_t own = blocks_in_row(rows, kScaleTile);
  if (c.grain == Grain::row)
    copy(to.scale_t.data(), e * m.cols, 1, m.scale_t.data(), m.cols, 1, 1, 4);
  else if (c.grain != Grain::tensor)
    copy(to.scale_t.data(), group_block(begin, e), blocks, m.scale_t.data(),
         c.layout_t().scale_rows(m.cols), own, own, 4);
}

void fill_ones(Buffer& b) { std::fill_n(b.as<float>(), b.size() / 4, 1.0f); }

// What the CPU makes of it.
void want(const Case& c, Results& to, Buffer& x) {
  fill_ones(to.scale);
  fill_ones(to.scale_t);
  const float* given = c.given.empty() ? nullptr : c.given.data();
  for (int64_t e = 0, begin = 0; e < c.groups(); ++e) {
    const int64_t rows = c.stacked() ? c.rows : c.ends[e] - begin;
    const int64_t first = c.stacked() ? e * c.rows : begin;
    if (c.stacked())
      put_matrix(c, to, Matrix(c, x, first, rows, given == nullptr ? nullptr : given + e), e);
    else if (rows > 0)
      put_group(c, to, Matrix(c, x, first, rows, nullptr), e, begin, rows);
    begin += rows;
  }
}

void check(const Case& c) {
  const int64_t n = Results::matrices(c) * c.rows * c.cols;
  Buffer x(n * size_of(c.from), c.skew * size_of(c.from));
  fill(&x, c.from, n, 23);
  if (c.from == DType::f32 && n > 0) x.as<float>()[n / 2] = c.odd;
  Results wanted(c, 0), got(c, 0x3b);
  if (c.valid) want(c, wanted, x);
  std::copy(c.given.begin(), c.given.end(), got.scale.as<float>());
  GroupedCast a = got.arguments(c, x);
  Buffer memory(cuda::cast_groups_workspace_bytes(a));
  a.workspace = memory.data();
  cuda::cast_groups(a, nullptr);
  CHECK(got.q.guards_hold() && got.qt.guards_hold());
  CHECK(got.scale.guards_hold() && got.scale_t.guards_hold() && memory.guards_hold());
  if (!c.valid) return;
  CHECK(wanted.q.bytes() == got.q.bytes());
  CHECK(wanted.qt.bytes() == got.qt.bytes());
  CHECK(same_scales(wanted.scale, got.scale));
  CHECK(same_scales(wanted.scale_t, got.scale_t));
}

Case rows_case(const std::vector<int64_t>& ends, int64_t rows, int64_t cols, Grain grain) {
  return {ends, rows, cols, grain};
}

Case stack_case(int64_t groups, int64_t rows, int64_t cols, Grain grain) {
  Case c = {{}, rows, cols, grain};
  c.stack = groups;
  return c;
}

constexpr Grain kGrains[] = {Grain::tensor, Grain::row, Grain::block};
constexpr Grain kStackGrains[] = {Grain::tensor, Grain::row, Grain::block, Grain::tile};

// Ragged, empty, of one row, one that has all, rows of none, around tiles, and no row at all.
const std::vector<std::pair<std::vector<int64_t>, int64_t>> kSplits = {{{37, 37, 38, 300}, 300},
                                                                       {{0, 0, 150, 150}, 150},
                                                                       {{1, 2, 3, 4}, 4},
                                                                       {{16, 48, 70}, 290},
                                                                       {{0, 0}, 20},
                                                                       {{128, 256}, 256},
                                                                       {{127, 256}, 257},
                                                                       {{100}, 250},
                                                                       {{0, 0, 0}, 0},
                                                                       {{}, 0},
                                                                       {{}, 130}};

}  // namespace

TEST(rows_of_every_division) {
  for (const auto& [ends, rows] : kSplits)
    for (const Grain grain : kGrains)
      for (const int64_t cols : {33, 144}) check(rows_case(ends, rows, cols, grain));
}

TEST(rows_with_tiles_of_the_transpose) {
  for (const auto& [ends, rows] : kSplits) {
    Case c = rows_case(ends, rows, 144, Grain::block);
    c.tiles_t = c.power_of_two = true;
    check(c);
  }
}

TEST(rows_of_every_type) {
  for (const DType from : {DType::f32, DType::f16, DType::bf16})
    for (const DType to : {DType::e4m3, DType::e5m2})
      for (const Grain grain : kGrains) {
        Case c = rows_case({20, 150}, 160, 48, grain);
        c.from = from;
        c.to = to;
        check(c);
      }
}

TEST(rows_without_the_transpose) {
  for (const Grain grain : kGrains) {
    Case c = rows_case({20, 150}, 160, 48, grain);
    c.which = 1;
    check(c);
  }
}

TEST(no_column) {
  for (const Grain grain : kGrains) check(rows_case({20, 150}, 160, 0, grain));
  for (const Grain grain : kStackGrains) check(stack_case(3, 40, 0, grain));
}

TEST(stacks_of_every_shape) {
  for (const Shape& s : {Shape{1, 1}, {16, 130}, {150, 33}, {257, 48}, {0, 20}})
    for (const int64_t groups : {0, 1, 3})
      for (const Grain grain : kStackGrains) check(stack_case(groups, s.rows, s.cols, grain));
}

TEST(stacks_of_every_type_and_layout) {
  for (const DType from : {DType::f32, DType::f16})
    for (const DType to : {DType::e4m3, DType::e5m2})
      for (const int which : {0, 1, 2, 3})
        for (const Grain grain : kStackGrains) {
          Case c = stack_case(2, 136, 80, grain);
          c.from = from;
          c.to = to;
          c.which = which;
          c.power_of_two = which == 3;
          check(c);
        }
}

TEST(stacks_with_given_scales) {
  for (const std::vector<float>& given :
       {std::vector<float>{0.5f, 3.0f}, {0.0f, 0.37f}, {NAN, INFINITY}}) {
    Case c = stack_case(2, 130, 33, Grain::tensor);
    c.given = given;
    check(c);
  }
}

TEST(values_that_are_not_finite) {
  for (const float odd : {1e6f, INFINITY, -INFINITY, std::nanf("")}) {
    for (const Grain grain : kGrains) {
      Case c = rows_case({20, 150}, 160, 48, grain);
      c.from = DType::f32;
      c.odd = odd;
      check(c);
    }
    for (const Grain grain : kStackGrains) {
      Case c = stack_case(3, 40, 144, grain);
      c.from = DType::f32;
      c.odd = odd;
      check(c);
    }
  }
}

TEST(views_that_are_not_aligned) {
  for (const Grain grain : kStackGrains) {
    Case c = stack_case(2, 40, 144, grain);
    c.skew = 3;
    check(c);
    if (grain == Grain::tile) continue;
    c = rows_case({20, 150}, 160, 48, grain);
    c.skew = 3;
    check(c);
  }
}

// The interpreter refuses an access outside of the tensors.
TEST(ends_out_of_range_touch_nothing_outside) {
  const int64_t far = int64_t(1) << 40;
  for (const std::vector<int64_t>& ends :
       {std::vector<int64_t>{-5, 1000, 3}, {far, -far, far}, {250, 160, 20}, {0, 301, 301}})
    for (const Grain grain : kGrains)
      for (const bool tiles_t : {false, true}) {
        Case c = rows_case(ends, 300, 40, grain);
        c.tiles_t = tiles_t && grain == Grain::block;
        c.valid = false;
        check(c);
      }
}

TEST(orders) {
  in_every_order([] {
    for (const Grain grain : kGrains) check(rows_case({5, 150}, 170, 140, grain));
    for (const Grain grain : kStackGrains) check(stack_case(2, 140, 40, grain));
  });
}

TEST(wrong_arguments_are_named) {
  const auto run = [](const Case& c, const std::function<void(GroupedCast&)>& change) {
    Buffer x(c.rows * c.cols * 4 * 4);
    Results got(c, 0);
    GroupedCast a = got.arguments(c, x);
    change(a);
    cuda::cast_groups(a, nullptr);
  };
  const Case rows = rows_case({3}, 4, 16, Grain::row), stack = stack_case(2, 4, 16, Grain::tensor);
  CHECK_THROWS(run(rows, [](GroupedCast& a) { a.grain = Grain::tile; }),
               "cast_groups: tiles are those of stacks alone");
  CHECK_THROWS(run(rows, [](GroupedCast& a) { a.tiles_t = true; }), "tiles_t goes with blocks");
  CHECK_THROWS(run(rows, [](GroupedCast& a) { a.given = true; }), "a given scale goes with");
  CHECK_THROWS(run(rows, [](GroupedCast& a) { a.q.rows = 16; }), "q must be [4, 16], got [16, 16]");
  CHECK_THROWS(run(rows, [](GroupedCast& a) { a.qt.dtype = DType::bf16; }), "must be e4m3 or e5m2");
  CHECK_THROWS(run(rows, [](GroupedCast& a) { a.x.dtype = DType::e4m3; }),
               "x must be f32, f16 or bf16, got e4m3");
  CHECK_THROWS(run(stack, [](GroupedCast&) {}), "cast_stack: no workspace");
  CHECK_THROWS(run(rows, [](GroupedCast& a) { a.qt.cols = 4; }),
               "qt must be [16, 16], got [16, 4]");
}
