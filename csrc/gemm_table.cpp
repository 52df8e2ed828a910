#include "quaver/gemm_table.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>

#include "quaver/check.h"

namespace quaver {
namespace {

std::mutex mutex;
std::map<GemmProblem, int> measured;
std::atomic<int64_t> version{0};

int index_of(const MeasuredGemm& row) {
  constexpr int some_gpu = 132;  // what serves does not depend on the multiprocessors
  const auto candidates = gemm_candidates(row.problem, some_gpu);
  const auto found =
      std::find_if(candidates.begin(), candidates.end(),
                   [&](const GemmCandidate& c) { return row.tactic == c.tactic->name; });
  QUAVER_CHECK(found != candidates.end(), "gemm table: no kernel ", row.tactic, " serves [",
               row.problem.m, ", ", row.problem.n, "] over K = ", row.problem.k,
               "; measure again with `quaver tune-gemm`");
  return found->index;
}

}  // namespace

void set_gemm_table(const std::vector<MeasuredGemm>& table) {
  std::map<GemmProblem, int> rows;
  for (const MeasuredGemm& row : table)
    QUAVER_CHECK(rows.emplace(row.problem, index_of(row)).second, "gemm table: [", row.problem.m,
                 ", ", row.problem.n, "] over K = ", row.problem.k, " comes twice");
  const std::lock_guard<std::mutex> lock(mutex);
  measured.swap(rows);
  ++version;
}

int measured_tactic(const GemmProblem& p) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = measured.find(p);
  return found == measured.end() ? -1 : found->second;
}

int64_t gemm_table_version() { return version; }

}  // namespace quaver
