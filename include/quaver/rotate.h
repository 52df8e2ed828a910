// Stage "rotate": rotary positions of queries and keys (RoFormer, arXiv 2104.09864, section 3.2.2),
// in the layout of attention's projections.
//
//   y = x * cos + swap(x) * sin, with a minus where it is inverse,
//
// where swap(x) has the halves of a head exchanged, and sin the minus of the first half's rotation.
// In f32 and in this order, rounded once.
#pragma once

#include "quaver/check.h"
#include "quaver/fp8.h"

namespace quaver {

constexpr int kMostParts = 3;  // queries, keys and values

// Heads [batch, length, heads, head_dim] with strides in elements; those of a head are neighbours.
struct HeadsView {
  const void* data = nullptr;
  int64_t heads = 0;
  int64_t batch_stride = 0, row_stride = 0, head_stride = 0;
};

struct Rotation {
  DType dtype = DType::f32;  // f32 or bf16, of parts and result
  int64_t batch = 0, length = 0, head_dim = 0;
  HeadsView part[kMostParts];
  int parts = 0;
  void* out = nullptr;         // [batch, length, heads of all parts, head_dim]
  const float* cos = nullptr;  // [length, head_dim]
  const float* sin = nullptr;
  int64_t turned = 0;  // heads from the first on; the others are copied
  bool inverse = false;

  int64_t heads() const {
    int64_t sum = 0;
    for (int k = 0; k < parts; ++k) sum += part[k].heads;
    return sum;
  }
  int64_t numel() const { return batch * length * heads() * head_dim; }
};

inline void check_rotation(const Rotation& r) {
  const char* op = "rotate";
  QUAVER_CHECK(r.dtype == DType::f32 || r.dtype == DType::bf16, op,
               ": parts must be f32 or bf16, got ", name_of(r.dtype));
  QUAVER_CHECK(r.parts >= 1 && r.parts <= kMostParts, op, ": parts must be 1 to ", kMostParts,
               " tensors, got ", r.parts);
  QUAVER_CHECK(r.head_dim % 2 == 0, op, ": a head must have an even number of values, got ",
               r.head_dim);
  QUAVER_CHECK(r.turned >= 0 && r.turned <= r.heads(), op, ": turned must be in [0, ", r.heads(),
               "], got ", r.turned);
}

namespace cpu {
void rotate(const Rotation& r);
}  // namespace cpu

namespace cuda {
// The CPU's bits on the device, in `stream`.
void rotate(const Rotation& r, void* stream);
}  // namespace cuda
}  // namespace quaver
