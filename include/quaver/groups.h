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

// The product of each group: out [S, N] = a [S, K] @ b [groups, N16, K] of the row's group,
// transposed, with scales of groups, rows or 1 x 128 blocks of a, and of groups, rows or 128 x 128
// tiles of b. Or, with `weight`, out [groups, M, N] = a @ b, transposed, over the group's columns
// of a [M16, W] and b [N16, W], which are transposed copies.
struct GroupedGemm {
  TensorView out, a, b;  // out in bf16, f16 or f32
  const float *scale_a = nullptr, *scale_b = nullptr;
  Grain grain_a = Grain::tensor, grain_b = Grain::tensor;  // tensor: one a group
  const int64_t* ends = nullptr;                           // [groups], on the device
  int64_t groups = 0, m = 0, n = 0;                        // m: with `weight`
  bool weight = false;

  bool has_blocks() const {
    const auto is = [](Grain g) { return g == Grain::block || g == Grain::tile; };
    return is(grain_a) || is(grain_b);
  }
};

// The cast of each group to FP8, with scales of its own. Of rows x [S, C]: q [S, C16] and its
// transpose qt [C16, group_columns]. Or, with `stack`, of x [groups, R, C]: q [groups, R16, C16]
// and qt [groups, C16, R16]. Codes beside values and those of rows of no group are zero, their
// scales 1.
//
// Scales of q and of qt, which are the other axis' (Bt: R16 / 128, or group_blocks of rows):
//   tensor  [groups], of both; with `given` they are read
//   row     [S, 1] or [groups, R16, 1], and [groups, C16, 1]
//   block   [S, C16 / 128] or [groups, R16, C16 / 128], and [C16, Bt] or [groups, C16, Bt]; with
//           tiles_t, of rows, [C16 / 128, Bt]
//   tile    of a stack alone: [groups, R16 / 128, C16 / 128], and [groups, C16 / 128, Bt]
struct GroupedCast {
  TensorView x, q, qt;  // no data in q or qt: that layout is not wanted
  float *scale = nullptr, *scale_t = nullptr;
  Grain grain = Grain::tensor;
  bool power_of_two = false, tiles_t = false, given = false, stack = false;
  const int64_t* ends = nullptr;  // [groups], on the device; not of a stack
  int64_t groups = 0;
  void* workspace = nullptr;  // cast_groups_workspace_bytes, 4-byte aligned
};

namespace cuda {
void cast_groups(const GroupedCast& arguments, void* stream);
int64_t cast_groups_workspace_bytes(const GroupedCast& arguments);
// By mma.sync, on GPUs from sm_89 on; sums are promoted to f32 each 128 of K. Scales of blocks on
// one side want blocks or tiles on the other.
void grouped_gemm(const GroupedGemm& arguments, void* stream);
}  // namespace cuda

}  // namespace quaver
