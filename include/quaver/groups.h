// Stage "groups": a matrix [S, C] whose rows are sorted by group, the tokens of a mixture's
// experts. The rows of group e are ends[e - 1] to ends[e]; rows from the last end on belong to
// none. The ends lie on the tensors' device, so that the host need not wait for a router.
//
// A transposed copy [C, S'] keeps the columns of each group from a multiple of 16 on, as products
// read them, and its scales of blocks begin anew with each group: both places follow from the
// group's first row and its number alone, so that no kernel has to sum over the groups before.
#pragma once

#include "quaver/cast.h"
#include "quaver/layout.h"

namespace quaver {

constexpr int64_t kGroupAlignment = 16;

// The column where the transposed copy of a group begins, and the block of 128 of its scales.
constexpr int64_t group_column(int64_t begin, int64_t group) {
  return (begin / kGroupAlignment + group) * kGroupAlignment;
}
constexpr int64_t group_block(int64_t begin, int64_t group) { return begin / kScaleTile + group; }

// The columns and blocks that any division of `rows` into `groups` fits into.
constexpr int64_t group_columns(int64_t rows, int64_t groups) { return group_column(rows, groups); }
constexpr int64_t group_blocks(int64_t rows, int64_t groups) { return group_block(rows, groups); }

}  // namespace quaver
