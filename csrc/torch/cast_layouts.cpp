#include "quaver/cast_layouts.h"

#include <tuple>

#include "results.h"

namespace quaver::binding {
namespace {

Grain grain_of(const char* op, const Word& granularity) {
  if (granularity.text == "row") return Grain::row;
  if (granularity.text == "block") return Grain::block;
  QUAVER_CHECK(granularity.text == "tile", op,
               ": granularity must be \"row\", \"block\" or \"tile\", got \"", granularity.text,
               "\"");
  return Grain::tile;
}

struct OperandResult {
  Tensor codes, scale;
};

// Empty where it is not wanted.
OperandResult operand_result(const Tensor& like, int64_t rows, int64_t cols, ScalarType dtype,
                             const Layout& layout, bool wanted) {
  if (!wanted) return {empty(like, {0}, dtype), empty(like, {0}, ScalarType::Float)};
  const int64_t r = gemm_padded(rows), c = gemm_padded(cols);
  return {empty(like, {r, c}, dtype),
          empty(like, {layout.scale_rows(r), layout.scales_in_row(c)}, ScalarType::Float)};
}

Operand operand_view(const char* op, const OperandResult& r, bool wanted) {
  return wanted ? Operand{present(op, "dtype", r.codes), view(op, "scale", r.scale)} : Operand{};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cast_layouts(const Tensor& x_in, ScalarType dtype,
                                                        const Word& granularity, bool rows,
                                                        bool columns, bool power_of_two) {
  const char* op = "cast_layouts";
  check_matrix(op, "x", x_in);
  LayoutsCast to;
  to.grain = grain_of(op, granularity);
  to.power_of_two = power_of_two;
  QUAVER_CHECK(is_fp8(dtype_of(op, "dtype", dtype)), op, ": dtype must be e4m3 or e5m2, got ",
               torch::headeronly::toString(dtype));
  const Tensor x = dense(x_in);
  const OperandResult q = operand_result(x, x.size(0), x.size(1), dtype, to.layout(), rows);
  const OperandResult qt = operand_result(x, x.size(1), x.size(0), dtype, to.layout(), columns);
  to.q = operand_view(op, q, rows);
  to.qt = operand_view(op, qt, columns);
  const TensorView values = view(op, "x", x);
  on_device(
      op, x, [&] { cpu::cast_layouts(to, values); },
      [&](auto stream) { cuda::cast_layouts(to, values, stream); });
  return {q.codes, q.scale, qt.codes, qt.scale};
}

template <class Library>
void register_ops(Library& m) {
  m.impl("cast_layouts", TORCH_BOX(&cast_layouts));
}

}  // namespace

QUAVER_OPS(register_ops)

}  // namespace quaver::binding
