// Checks of subset_sums' arguments, the same for every backend.
#pragma once

#include "quaver/check.h"
#include "quaver/subset.h"

namespace quaver {

inline void check_subset_width(const char* op, const Subsets& s, int64_t n) {
  QUAVER_CHECK(s.width >= 0 && (!s.strided || n % s.width == 0), op,
               ": subsets must be positive, or minus a divisor of the ", n, " elements, got ",
               s.strided ? -s.width : s.width);
}

inline void check_subset_sums(const SubsetGrad& g) {
  check_subset_width("subset_sums", g.subsets, g.grad.values.numel());
  QUAVER_CHECK(g.sums != nullptr || subset_count(g.subsets, g.grad.values.numel()) == 0,
               "subset_sums: sums are needed");
}

}  // namespace quaver
