#include "quaver/cast_layouts.h"

#include <tuple>

#include "layouts.h"

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

std::tuple<Tensor, Tensor, Tensor, Tensor> cast_layouts(const Tensor& x_in, ScalarType dtype,
                                                        const Word& granularity, bool rows,
                                                        bool columns, bool power_of_two,
                                                        bool tiles_t) {
  const char* op = "cast_layouts";
  check_matrix(op, "x", x_in);
  LayoutsCast to;
  to.grain = grain_of(op, granularity);
  to.power_of_two = power_of_two;
  to.tiles_t = tiles_t;
  check_fp8(op, dtype);
  const Tensor x = dense(x_in);
  const OperandResult q = operand_result(x, x.size(0), x.size(1), dtype, to.layout(), rows);
  const OperandResult qt = operand_result(x, x.size(1), x.size(0), dtype, to.layout_t(), columns);
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
