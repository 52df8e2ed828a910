// Tensors whose rows are sorted by group, as the grouped ops take them, and copies on the host.
#pragma once

#include <cstring>
#include <vector>

#include "layouts.h"
#include "quaver/groups.h"

namespace quaver::binding {

// The rows of a group.
struct GroupRows {
  int64_t group, begin, rows;
};

inline void check_ends(const char* op, const Tensor& like, const Tensor& ends) {
  check_device(op, like, "ends", ends);
  QUAVER_CHECK(ends.scalar_type() == ScalarType::Long && ends.dim() == 1 && ends.is_contiguous(),
               op, ": ends must be contiguous int64 [groups], got ", ends.dim(), " dimensions of ",
               torch::headeronly::toString(ends.scalar_type()));
}

// Those groups of a CPU's tensor that have rows.
inline std::vector<GroupRows> groups_of(const char* op, const Tensor& ends, int64_t rows) {
  const auto* end = static_cast<const int64_t*>(ends.data_ptr());
  std::vector<GroupRows> found;
  for (int64_t e = 0, begin = 0; e < ends.numel(); begin = end[e++]) {
    QUAVER_CHECK(end[e] >= begin && end[e] <= rows, op, ": ends must rise from 0 to ", rows,
                 " at most, got ", end[e], " after ", begin);
    if (end[e] > begin) found.push_back({e, begin, end[e] - begin});
  }
  return found;
}

inline char* bytes_of(const Tensor& t) { return static_cast<char*>(t.data_ptr()); }

inline void fill_zeros(const Tensor& t) {
  if (t.numel() > 0) std::memset(bytes_of(t), 0, static_cast<size_t>(t.numel() * t.element_size()));
}

inline void fill_ones(const Tensor& t) {
  std::fill_n(static_cast<float*>(t.data_ptr()), t.numel(), 1.0f);
}

inline Tensor zeros(const Tensor& like, const Shape& shape, ScalarType type) {
  Tensor t = empty(like, shape, type);
  fill_zeros(t);
  return t;
}

// A place in a matrix.
struct Corner {
  int64_t row, col;
};

// Copies a rectangle between two matrices of one dtype.
inline void copy_rectangle(const Tensor& to, Corner at, const Tensor& from, Corner first,
                           int64_t rows, int64_t cols) {
  const int64_t size = from.element_size(), to_row = to.size(1) * size,
                from_row = from.size(1) * size;
  char* target = bytes_of(to) + at.row * to_row + at.col * size;
  const char* source = bytes_of(from) + first.row * from_row + first.col * size;
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(target + r * to_row, source + r * from_row, static_cast<size_t>(cols * size));
}

// The rectangle with zeros up to [height, width].
inline Tensor rectangle(const Tensor& from, Corner first, int64_t rows, int64_t cols,
                        int64_t height, int64_t width) {
  Tensor to = zeros(from, {height, width}, from.scalar_type());
  copy_rectangle(to, {0, 0}, from, first, rows, cols);
  return to;
}

// The matrix of a group in a stack.
inline Tensor matrix_of(const Tensor& stack, int64_t group) {
  return torch::stable::select(stack, 0, group);
}

}  // namespace quaver::binding
