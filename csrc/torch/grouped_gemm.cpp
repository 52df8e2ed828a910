// grouped_gemm and grouped_gemm_weight: the products of a mixture's experts. On the CPU they are
// those of `gemm`, one group after the other, over operands that are padded as that op wants them;
// on CUDA one launch by mma.sync.
#include "../arguments.h"
#include "groups.h"
#include "quaver/gemm_choice.h"
#include "stages.h"

namespace quaver::binding {
namespace {

void check_codes(const char* op, const char* name, const Tensor& t, int64_t dims) {
  QUAVER_CHECK(t.dim() == dims, op, ": ", name, " must have ", dims, " dimensions, got ", t.dim());
  const DType type = dtype_of(op, name, t.scalar_type());
  QUAVER_CHECK(is_fp8(type), op, ": ", name, " must be e4m3 or e5m2, got ", name_of(type));
}

void check_scale(const char* op, const char* name, const Tensor& scale, bool fits,
                 const char* wanted) {
  QUAVER_CHECK(scale.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32, got ",
               torch::headeronly::toString(scale.scalar_type()));
  std::string got;
  for (int64_t d = 0; d < scale.dim(); ++d)
    got += (d == 0 ? "" : ", ") + std::to_string(scale.size(d));
  QUAVER_CHECK(fits, op, ": ", name, " must be ", wanted, ", got [", got, "]");
}

bool has_sizes(const Tensor& t, const Shape& shape) { return shape_of(t) == shape; }

// a [S, K]: a scale for each group, row or 1 x 128 block. b [groups, N, K]: for each group, row or
// 128 x 128 tile.
void check_operands(const char* op, const Tensor& a, const Tensor& scale_a, const Tensor& b,
                    const Tensor& scale_b, const Tensor& ends, int64_t n) {
  check_codes(op, "a", a, 2);
  check_codes(op, "b", b, 3);
  for (const auto& [name, t] : {std::pair("scale_a", scale_a), {"b", b}, {"scale_b", scale_b}})
    check_device(op, a, name, t);
  check_ends(op, a, ends);
  const int64_t groups = ends.numel(), rows = b.size(1), k = a.size(1);
  QUAVER_CHECK(b.size(0) == groups && b.size(2) == k && k % kGroupAlignment == 0, op,
               ": b must be [", groups, ", N, ", k, "] with K in multiples of 16, got [", b.size(0),
               ", ", rows, ", ", b.size(2), "]");
  QUAVER_CHECK(n >= 0 && gemm_padded(n) == rows, op, ": b of a result of ", n,
               " columns must have ", gemm_padded(n), " rows, got ", rows);
  const int64_t s = a.size(0), blocks = blocks_in_row(k, kScaleTile);
  check_scale(
      op, "scale_a", scale_a,
      has_sizes(scale_a, {groups}) || has_sizes(scale_a, {s, 1}) || has_sizes(scale_a, {s, blocks}),
      "[groups], [S, 1] or [S, K / 128]");
  check_scale(op, "scale_b", scale_b,
              has_sizes(scale_b, {groups}) || has_sizes(scale_b, {groups, rows, 1}) ||
                  has_sizes(scale_b, {groups, blocks_in_row(rows, kScaleTile), blocks}),
              "[groups], [groups, N, 1] or [groups, N / 128, K / 128]");
}

// What both products give to the kernel, except the grains.
GroupedGemm arguments_of(const char* op, const Tensor& out, const Tensor& a, const Tensor& scale_a,
                         const Tensor& b, const Tensor& scale_b, const Tensor& ends) {
  const cuda::GemmDevice device = cuda::gemm_device();
  QUAVER_CHECK(multiplies_fp8(device.major, device.minor), op,
               ": CUDA wants a GPU from sm_89 on, got sm_", device.major, device.minor);
  GroupedGemm g;
  g.out = view(op, "out", out);
  g.a = view(op, "a", a);
  g.b = view(op, "b", b);
  g.scale_a = static_cast<const float*>(scale_a.data_ptr());
  g.scale_b = static_cast<const float*>(scale_b.data_ptr());
  g.ends = static_cast<const int64_t*>(ends.data_ptr());
  g.groups = ends.numel();
  g.n = out.size(out.dim() - 1);
  return g;
}

// Of scales with one block a row, which are those of rows too, the other operand's decide.
void set_grains(GroupedGemm* g, const Tensor& scale_a, const Tensor& scale_b, int64_t rows_b,
                int64_t blocks) {
  g->grain_b = scale_b.dim() == 1          ? Grain::tensor
               : scale_b.size(1) == rows_b ? Grain::row
                                           : Grain::tile;
  const bool blocks_a = scale_a.dim() == 2 && scale_a.size(1) == blocks;
  g->grain_a = scale_a.dim() == 1                                      ? Grain::tensor
               : blocks_a && (blocks > 1 || g->grain_b == Grain::tile) ? Grain::block
                                                                       : Grain::row;
}

Grain transposed_grain(const Tensor& codes, const Tensor& scale) {
  if (scale.dim() == 1) return Grain::tensor;
  if (scale.dim() == 3) return Grain::row;
  return scale.size(0) == codes.size(0) ? Grain::block : Grain::tile;
}

// The scales of a group's rows, padded as its codes are.
Tensor row_scales(const Tensor& scale, const GroupRows& g) {
  if (scale.dim() == 1) return matrix_of(scale, g.group);
  return rectangle(scale, {g.begin, 0}, g.rows, scale.size(1), gemm_padded(g.rows), scale.size(1));
}

Tensor grouped_gemm(const Tensor& a_in, const Tensor& scale_a_in, const Tensor& b_in,
                    const Tensor& scale_b_in, const Tensor& ends, int64_t n, ScalarType out_dtype,
                    bool fast_accumulate) {
  const char* op = "grouped_gemm";
  check_operands(op, a_in, scale_a_in, b_in, scale_b_in, ends, n);
  const Tensor a = dense(a_in), scale_a = dense(scale_a_in);
  const Tensor b = dense(b_in), scale_b = dense(scale_b_in);
  const int64_t k = a.size(1), padded = b.size(1);
  std::optional<Tensor> out;
  on_device(
      op, a,
      [&] {
        const std::vector<GroupRows> groups = groups_of(op, ends, a.size(0));
        out = zeros(a, {a.size(0), n}, out_dtype);
        for (const GroupRows& g : groups) {
          const int64_t rows = gemm_padded(g.rows);
          const Tensor y = empty(a, {rows, padded}, out_dtype);
          run_product(
              prepare_product({y, rectangle(a, {g.begin, 0}, g.rows, k, rows, k),
                               row_scales(scale_a, g), matrix_of(b, g.group),
                               matrix_of(scale_b, g.group), std::nullopt, false, fast_accumulate}));
          copy_rectangle(*out, {g.begin, 0}, y, {0, 0}, g.rows, n);
        }
      },
      [&](auto stream) {
        out = empty(a, {a.size(0), n}, out_dtype);
        GroupedGemm g = arguments_of(op, *out, a, scale_a, b, scale_b, ends);
        set_grains(&g, scale_a, scale_b, padded, blocks_in_row(k, kScaleTile));
        cuda::grouped_gemm(g, stream);
      });
  return *out;
}

// A transposed operand [rows, S'] of the weight's gradient: a scale for each group, row of a group,
// 1 x 128 block or 128 x 128 tile.
void check_transposed(const char* op, const char* name, const Tensor& codes, const char* scale_name,
                      const Tensor& scale, int64_t wanted, int64_t groups) {
  check_codes(op, name, codes, 2);
  const int64_t rows = codes.size(0), width = codes.size(1);
  QUAVER_CHECK(rows == gemm_padded(wanted), op, ": ", name, " of ", wanted, " rows must have ",
               gemm_padded(wanted), ", got ", rows);
  const int64_t least = (width / kGroupAlignment - groups) * kGroupAlignment;  // of S
  QUAVER_CHECK(least >= 0 && width % kGroupAlignment == 0, op, ": ", name, " must have ",
               kGroupAlignment, " columns a group at least, got ", width);
  const int64_t blocks = group_blocks(least, groups), tiles = blocks_in_row(rows, kScaleTile);
  check_scale(op, scale_name, scale,
              has_sizes(scale, {groups}) || has_sizes(scale, {groups, rows, 1}) ||
                  has_sizes(scale, {rows, blocks}) || has_sizes(scale, {tiles, blocks}),
              "[groups], [groups, rows, 1], [rows, blocks] or [tiles, blocks] as cast_groups makes "
              "it");
}

Tensor columns_of(const Tensor& codes, const GroupRows& g) {
  const int64_t rows = codes.size(0), cols = gemm_padded(g.rows);
  return rectangle(codes, {0, group_column(g.begin, g.group)}, rows, cols, rows, cols);
}

Tensor column_scales(const Tensor& scale, const GroupRows& g) {
  if (scale.dim() != 2) return matrix_of(scale, g.group);
  const int64_t rows = scale.size(0), blocks = blocks_in_row(g.rows, kScaleTile);
  return rectangle(scale, {0, group_block(g.begin, g.group)}, rows, blocks, rows, blocks);
}

Tensor grouped_gemm_weight(const Tensor& a_in, const Tensor& scale_a_in, const Tensor& b_in,
                           const Tensor& scale_b_in, const Tensor& ends, int64_t m, int64_t n,
                           ScalarType out_dtype, bool fast_accumulate) {
  const char* op = "grouped_gemm_weight";
  for (const auto& [name, t] :
       {std::pair("scale_a", scale_a_in), {"b", b_in}, {"scale_b", scale_b_in}})
    check_device(op, a_in, name, t);
  check_ends(op, a_in, ends);
  const int64_t groups = ends.numel();
  check_transposed(op, "a", a_in, "scale_a", scale_a_in, m, groups);
  check_transposed(op, "b", b_in, "scale_b", scale_b_in, n, groups);
  QUAVER_CHECK(a_in.size(1) == b_in.size(1), op, ": a and b must have as many columns, got ",
               a_in.size(1), " and ", b_in.size(1));
  const Tensor a = dense(a_in), scale_a = dense(scale_a_in);
  const Tensor b = dense(b_in), scale_b = dense(scale_b_in);
  std::optional<Tensor> out;
  on_device(
      op, a,
      [&] {
        const int64_t most = a.size(1) - groups * kGroupAlignment + kGroupAlignment - 1;  // of S
        const std::vector<GroupRows> ranges = groups_of(op, ends, most);
        out = zeros(a, {groups, m, n}, out_dtype);
        for (const GroupRows& g : ranges) {
          const Tensor y = empty(a, {a.size(0), b.size(0)}, out_dtype);
          run_product(
              prepare_product({y, columns_of(a, g), column_scales(scale_a, g), columns_of(b, g),
                               column_scales(scale_b, g), std::nullopt, false, fast_accumulate}));
          copy_rectangle(matrix_of(*out, g.group), {0, 0}, y, {0, 0}, m, n);
        }
      },
      [&](auto stream) {
        out = empty(a, {groups, m, n}, out_dtype);
        GroupedGemm g = arguments_of(op, *out, a, scale_a, b, scale_b, ends);
        g.grain_a = transposed_grain(a, scale_a);
        g.grain_b = transposed_grain(b, scale_b);
        g.m = m;
        g.weight = true;
        cuda::grouped_gemm(g, stream);
      });
  return *out;
}

template <class Library>
void register_ops(Library& m) {
  m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm));
  m.impl("grouped_gemm_weight", TORCH_BOX(&grouped_gemm_weight));
}

}  // namespace

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
