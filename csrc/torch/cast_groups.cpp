// cast_groups and cast_stack: the operands of a mixture's experts in FP8, each expert's with scales
// of its own. On the CPU they are the casts of one matrix after the other, in one op; on CUDA a few
// launches.
#include <tuple>

#include "groups.h"
#include "stages.h"

namespace quaver::binding {
namespace {

using Operands = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Grain grain_of(const char* op, const Word& granularity) {
  for (const auto& [name, grain] : {std::pair("tensor", Grain::tensor),
                                    {"row", Grain::row},
                                    {"block", Grain::block},
                                    {"tile", Grain::tile}})
    if (granularity.text == name) return grain;
  fail(op, ": granularity must be \"tensor\", \"row\", \"block\" or \"tile\", got \"",
       granularity.text, "\"");
}

// What a cast does, in every group.
struct Wanted {
  const char* op;
  ScalarType dtype;
  Grain grain;
  bool rows, columns, power_of_two, tiles_t;
};

// One matrix in both layouts, as the op of that matrix alone would cast it.
struct Matrix {
  OperandResult q, qt;
};

Matrix cast_matrix(const Wanted& w, const Tensor& x, const OptionalTensor& scale) {
  if (w.grain == Grain::tensor) {
    const PendingCast cast = prepare_cast(w.op, x, w.dtype, w.columns, scale, std::nullopt);
    run_casts(w.op, {&cast});
    return {{cast.to.q, cast.to.scale}, {w.columns ? *cast.to.qt : cast.to.q, cast.to.scale}};
  }
  LayoutsCast to;
  to.grain = w.grain;
  to.power_of_two = w.power_of_two;
  to.tiles_t = w.tiles_t;
  const int64_t r = x.size(0), c = x.size(1);
  const Matrix m = {operand_result(x, r, c, w.dtype, to.layout(), w.rows),
                    operand_result(x, c, r, w.dtype, to.layout_t(), w.columns)};
  to.q = operand_view(w.op, m.q, w.rows);
  to.qt = operand_view(w.op, m.qt, w.columns);
  cpu::cast_layouts(to, view(w.op, "x", x));
  return m;
}

// The bytes of a matrix's results into those of its stack or group, from element `at` on.
void put(const Tensor& to, int64_t at, const Tensor& from) {
  std::memcpy(bytes_of(to) + at * to.element_size(), bytes_of(from),
              static_cast<size_t>(from.numel() * from.element_size()));
}

// The transpose of a group: codes and scales have their own columns, or, of rows, a matrix of
// scales each.
void put_transposed(const Wanted& w, const Operands& out, const Matrix& m, const GroupRows& g) {
  const Tensor &qt = std::get<2>(out), &scale = std::get<3>(out);
  copy_rectangle(qt, {0, group_column(g.begin, g.group)}, m.qt.codes, {0, 0}, qt.size(0),
                 m.qt.codes.size(1));
  if (w.grain == Grain::row) return put(scale, g.group * m.qt.scale.numel(), m.qt.scale);
  if (w.grain == Grain::tensor) return;
  copy_rectangle(scale, {0, group_block(g.begin, g.group)}, m.qt.scale, {0, 0}, scale.size(0),
                 m.qt.scale.size(1));
}

void put_rows(const Wanted& w, const Operands& out, const Matrix& m, const GroupRows& g) {
  const Tensor &q = std::get<0>(out), &scale = std::get<1>(out);
  copy_rectangle(q, {g.begin, 0}, m.q.codes, {0, 0}, g.rows, q.size(1));
  if (w.grain == Grain::tensor) return put(scale, g.group, m.q.scale);
  copy_rectangle(scale, {g.begin, 0}, m.q.scale, {0, 0}, g.rows, scale.size(1));
}

// Scales of qt [C, S']: those of rows are a matrix [C, 1] for each group.
Shape transposed_scales(const Wanted& w, int64_t cols, int64_t rows, int64_t groups) {
  if (!w.columns || w.grain == Grain::tensor) return {0};
  if (w.grain == Grain::row) return {groups, cols, 1};
  const Layout layout = {w.tiles_t ? Grain::tile : w.grain, kScaleTile};
  return {layout.scale_rows(cols), group_blocks(rows, groups)};
}

Operands groups_results(const Wanted& w, const Tensor& x, int64_t groups) {
  const int64_t rows = x.size(0), cols = gemm_padded(x.size(1));
  const Layout layout = {w.grain, kScaleTile};
  const Shape scales =
      w.grain == Grain::tensor ? Shape{groups} : Shape{rows, layout.scales_in_row(cols)};
  const Shape transposed = w.columns ? Shape{cols, group_columns(rows, groups)} : Shape{0};
  return {empty(x, {rows, cols}, w.dtype), empty(x, scales, ScalarType::Float),
          empty(x, transposed, w.dtype),
          empty(x, transposed_scales(w, cols, rows, groups), ScalarType::Float)};
}

void cast_groups_on_cpu(const Wanted& w, const Operands& out, const Tensor& x, const Tensor& ends) {
  const std::vector<GroupRows> groups = groups_of(w.op, ends, x.size(0));
  const auto& [q, scale, qt, scale_t] = out;  // what no group writes
  fill_zeros(q);
  fill_ones(scale);
  fill_zeros(qt);
  fill_ones(scale_t);
  for (const GroupRows& g : groups) {
    const Tensor rows = torch::stable::narrow(const_cast<Tensor&>(x), 0, g.begin, g.rows);
    const Matrix m = cast_matrix(w, rows, std::nullopt);
    put_rows(w, out, m, g);
    if (w.columns) put_transposed(w, out, m, g);
  }
}

// What CUDA's cast takes of groups and of stacks.
GroupedCast arguments_of(const Wanted& w, const Operands& out, const Tensor& x, int64_t groups) {
  const auto& [q, scale, qt, scale_t] = out;
  const auto codes = [&](const Tensor& t, bool wanted) {
    return wanted ? present(w.op, "dtype", t)
                  : TensorView{nullptr, dtype_of(w.op, "dtype", w.dtype), 0, 0};
  };
  GroupedCast c;
  c.x = view(w.op, "x", x);
  c.q = codes(q, w.rows);
  c.qt = codes(qt, w.columns);
  c.scale = static_cast<float*>(scale.data_ptr());
  c.scale_t = static_cast<float*>(scale_t.data_ptr());
  c.grain = w.grain;
  c.power_of_two = w.power_of_two || w.grain == Grain::tensor;
  c.tiles_t = w.tiles_t;
  c.groups = groups;
  return c;
}

Operands cast_groups(const Tensor& x_in, const Tensor& ends, ScalarType dtype,
                     const Word& granularity, bool columns, bool power_of_two, bool tiles_t) {
  const Wanted w = {"cast_groups", dtype,  grain_of("cast_groups", granularity), true, columns,
                    power_of_two,  tiles_t};
  check_matrix(w.op, "x", x_in);
  check_ends(w.op, x_in, ends);
  check_fp8(w.op, dtype);
  QUAVER_CHECK(w.grain != Grain::tile, w.op,
               ": tiles are those of weights (cast_stack); rows take \"tensor\", \"row\" or "
               "\"block\"");
  QUAVER_CHECK(!tiles_t || w.grain == Grain::block, w.op,
               ": tiles_t goes with granularity block alone");
  const Tensor x = dense(x_in);
  const Operands out = groups_results(w, x, ends.numel());
  on_device(
      w.op, x, [&] { cast_groups_on_cpu(w, out, x, ends); },
      [&](auto stream) {
        GroupedCast c = arguments_of(w, out, x, ends.numel());
        c.ends = static_cast<const int64_t*>(ends.data_ptr());
        const Tensor memory = workspace(x, cuda::cast_groups_workspace_bytes(c));
        c.workspace = memory.data_ptr();
        cuda::cast_groups(c, stream);
      });
  return out;
}

// One layout of a stack [groups, rows, cols]; empty where it is not wanted.
OperandResult stack_result(const Wanted& w, const Tensor& like, int64_t groups, int64_t rows,
                           int64_t cols, bool wanted) {
  if (!wanted) return {empty(like, {0}, w.dtype), empty(like, {0}, ScalarType::Float)};
  const Layout layout = {w.grain, kScaleTile};
  const int64_t r = gemm_padded(rows), c = gemm_padded(cols);
  const Shape scales = w.grain == Grain::tensor
                           ? Shape{0}
                           : Shape{groups, layout.scale_rows(r), layout.scales_in_row(c)};
  return {empty(like, {groups, r, c}, w.dtype), empty(like, scales, ScalarType::Float)};
}

// With `given` the scales are read.
void cast_stack_on_cpu(const Wanted& w, const Operands& out, const Tensor& x, bool given) {
  const auto& [q, scale, qt, scale_t] = out;
  const bool whole = w.grain == Grain::tensor;
  for (int64_t e = 0; e < x.size(0); ++e) {
    const Matrix m =
        cast_matrix(w, matrix_of(x, e), given ? OptionalTensor(matrix_of(scale, e)) : std::nullopt);
    if (w.rows) put(q, e * m.q.codes.numel(), m.q.codes);
    if (w.columns) put(qt, e * m.qt.codes.numel(), m.qt.codes);
    if (w.rows || whole) put(scale, e * m.q.scale.numel(), m.q.scale);
    if (w.columns && !whole) put(scale_t, e * m.qt.scale.numel(), m.qt.scale);
  }
}

Operands cast_stack(const Tensor& x_in, ScalarType dtype, const Word& granularity,
                    const OptionalTensor& scale, bool rows, bool columns, bool power_of_two) {
  const Wanted w = {"cast_stack", dtype, grain_of("cast_stack", granularity), rows, columns,
                    power_of_two, false};
  QUAVER_CHECK(x_in.dim() == 3, w.op, ": x must be [groups, R, C], got ", x_in.dim(),
               " dimensions");
  check_fp8(w.op, dtype);
  check_device(w.op, x_in, "scale", scale);
  const Tensor x = dense(x_in);
  const int64_t groups = x.size(0);
  QUAVER_CHECK(!scale.has_value() || w.grain == Grain::tensor, w.op,
               ": a given scale goes with granularity tensor alone");
  OperandResult q = stack_result(w, x, groups, x.size(1), x.size(2), rows);
  OperandResult qt = stack_result(w, x, groups, x.size(2), x.size(1), columns);
  if (w.grain == Grain::tensor) q.scale = scale_tensor(w.op, x, scale, {groups});
  const Operands out = {q.codes, q.scale, qt.codes, qt.scale};
  on_device(
      w.op, x, [&] { cast_stack_on_cpu(w, out, x, scale.has_value()); },
      [&](auto stream) {
        GroupedCast c = arguments_of(w, out, x, groups);
        c.given = scale.has_value();
        c.stack = true;
        const Tensor memory = workspace(x, cuda::cast_groups_workspace_bytes(c));
        c.workspace = memory.data_ptr();
        cuda::cast_groups(c, stream);
      });
  return out;
}

template <class Library>
void register_ops(Library& m) {
  m.impl("cast_groups", TORCH_BOX(&cast_groups));
  m.impl("cast_stack", TORCH_BOX(&cast_stack));
}

}  // namespace

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
