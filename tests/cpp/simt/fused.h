// Results of normalize and activate in guarded memory, one set for each backend.
#pragma once

#include "cast_workspace.h"
#include "quaver/cast.h"

namespace quaver::test {

struct CastMemory {
  int64_t rows, cols;
  DType type;
  Buffer q, qt;
  float scale = -3.0f, amax = -3.0f;
  std::vector<float> history;
  CastWorkspace workspace;

  CastMemory(const Shape& s, DType type, int64_t skew, unsigned char pattern)
      : rows(gemm_padded(s.rows)),
        cols(gemm_padded(s.cols)),
        type(type),
        q(rows * cols, skew, pattern),
        qt(rows * cols, skew, pattern),
        workspace(s.rows, s.cols) {}
  GemmCast cast(bool given, bool power_of_two = true) {
    GemmCast c;
    c.q = view(q, type, rows, cols);
    c.qt = view(qt, type, cols, rows);
    c.scale = &scale;
    c.amax = &amax;
    c.power_of_two = power_of_two;
    c.source = workspace.with({given});
    if (given) scale = 0.37f;
    c.source.history = history.empty() ? nullptr : history.data();
    return c;
  }
};

inline void check_same(CastMemory& wanted, CastMemory& got) {
  CHECK(wanted.q.bytes() == got.q.bytes());
  CHECK(wanted.qt.bytes() == got.qt.bytes());
  CHECK(same_bits({wanted.scale, wanted.amax}, {got.scale, got.amax}));
  CHECK(same_bits(wanted.history, got.history));
  CHECK(got.q.guards_hold() && got.qt.guards_hold() && got.workspace.guards_hold());
}

struct GroupMemory {
  int64_t rows, cols, block;
  Buffer codes, scale;

  GroupMemory(const Shape& s, int64_t block, int64_t skew, unsigned char pattern)
      : rows(s.rows),
        cols(s.cols),
        block(block),
        codes(s.rows * s.cols, skew, pattern),
        scale(s.rows * blocks_in_row(s.cols, block), skew, pattern) {}
  GroupedView grouped() {
    GroupedView v;
    v.codes = view(codes, DType::e4m3, rows, cols);
    v.scale = scale.data();
    v.layout.block = block;
    return v;
  }
};

inline void check_same(GroupMemory& wanted, GroupMemory& got) {
  CHECK(wanted.codes.bytes() == got.codes.bytes());
  CHECK(wanted.scale.bytes() == got.scale.bytes());
  CHECK(got.codes.guards_hold() && got.scale.guards_hold());
}

// Values whose products and squares stay in range.
inline void fill_small(Buffer* to, DType type, int64_t n, uint64_t seed) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = random_bits(seed, static_cast<uint64_t>(i));
    float x = bit_cast<float>((bits & 0x807fffffu) | (121 + bits % 9) << 23);
    if (bits % 97 == 0) x = 0.0f;
    if (type == DType::f32) to->as<float>()[i] = x;
    if (type == DType::f16) to->as<f16>()[i] = encode_nearest<f16>(x);
    if (type == DType::bf16) to->as<bf16>()[i] = encode_nearest<bf16>(x);
  }
}

inline const std::vector<DType> kFloats = {DType::f32, DType::f16, DType::bf16};

}  // namespace quaver::test
