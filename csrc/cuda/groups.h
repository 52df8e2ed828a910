// Groups of rows whose ends lie on the device (quaver/groups.h), as blocks of threads find theirs.
// A group's tiles of kRows rows have slots from begin / kRows + group on, which no two groups
// share; those of rows of no group come last. A grid has a block for each slot of any division.
#pragma once

#include "launch.h"
#include "quaver/groups.h"

namespace quaver::cuda {

struct Groups {
  const int64_t* ends;
  int most;  // that an end can be
  int count;
};

// Slots of `rows` rows, those of no group included.
template <int kRows>
constexpr int slot_count(int rows, int groups) {
  return rows / kRows + groups + 1;
}

// A device cannot refuse ends: those out of range are brought into it, so that wrong ones give
// wrong numbers and no access outside.
QUAVER_DEVICE int end_of(const Groups& g, int group) {
  const int64_t end = g.ends[group];
  return static_cast<int>(end < 0 ? 0 : end < g.most ? end : g.most);
}

QUAVER_DEVICE int first_row(const Groups& g, int group) {
  return group == 0 ? 0 : end_of(g, group - 1);
}

// The place of a group's first tile among all.
template <int kRows>
QUAVER_DEVICE int first_slot(const Groups& g, int group) {
  return first_row(g, group) / kRows + group;
}

// The group that a slot belongs to; the last one is of rows of no group.
template <int kRows>
QUAVER_DEVICE int group_of(const Groups& g, int slot) {
  int low = 0, high = g.count;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first_slot<kRows>(g, middle) <= slot)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

}  // namespace quaver::cuda
