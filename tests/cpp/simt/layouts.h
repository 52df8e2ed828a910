// Results in the layouts that products read, in guarded memory, of both backends.
#pragma once

#include <cmath>

#include "quaver/cast_layouts.h"
#include "simt/cases.h"

namespace quaver::test {

// NaNs of any payload are one.
inline bool same_scales(Buffer& a, Buffer& b) {
  for (int64_t i = 0; i < a.size() / 4; ++i) {
    const float x = a.as<float>()[i], y = b.as<float>()[i];
    if (bit_cast<uint32_t>(x) != bit_cast<uint32_t>(y) && !(std::isnan(x) && std::isnan(y)))
      return false;
  }
  return true;
}

// One layout's codes and scales, of both backends.
struct OperandMemory {
  int64_t rows, cols;
  Layout layout;
  DType type;
  Buffer wanted, got, wanted_scale, got_scale;

  OperandMemory(int64_t r, int64_t c, const Layout& l, DType t, int64_t skew)
      : rows(gemm_padded(r)),
        cols(gemm_padded(c)),
        layout(l),
        type(t),
        wanted(rows * cols),
        got(rows * cols, skew, 0x3b),
        wanted_scale(4 * count()),
        got_scale(4 * count(), 0, 0x3b) {}

  int64_t count() const { return layout.scale_rows(rows) * layout.scales_in_row(cols); }
  Operand operand(Buffer& codes, Buffer& scale) {
    return {view(codes, type, rows, cols), view(scale, DType::f32, 1, count())};
  }
  void check() {
    CHECK(wanted.bytes() == got.bytes());
    CHECK(same_scales(wanted_scale, got_scale));
    CHECK(got.guards_hold() && got_scale.guards_hold());
  }
};

// Both layouts of a result in blocks.
struct LayoutsMemory {
  LayoutsCast cast;
  OperandMemory q, qt;

  LayoutsMemory(const Shape& s, DType type, bool tiles_t, bool power_of_two, int64_t skew)
      : cast(make(tiles_t, power_of_two)),
        q(s.rows, s.cols, cast.layout(), type, skew),
        qt(s.cols, s.rows, cast.layout_t(), type, skew) {}
  LayoutsCast wanted() {
    return with(q.operand(q.wanted, q.wanted_scale), qt.operand(qt.wanted, qt.wanted_scale));
  }
  LayoutsCast got() {
    return with(q.operand(q.got, q.got_scale), qt.operand(qt.got, qt.got_scale));
  }
  void check() {
    q.check();
    qt.check();
  }

 private:
  static LayoutsCast make(bool tiles_t, bool power_of_two) {
    LayoutsCast c;
    c.tiles_t = tiles_t;
    c.power_of_two = power_of_two;
    return c;
  }
  LayoutsCast with(const Operand& codes, const Operand& codes_t) const {
    LayoutsCast c = cast;
    c.q = codes;
    c.qt = codes_t;
    return c;
  }
};

}  // namespace quaver::test
