// What the optimizer kernels share, which step lists of parameters: the workspace of a call and the
// launch that begins it. `Entry` is the table entry of a parameter, `Plan` what a step of it
// computes once. For both a kernel's file has `grad_amax_of(entry)` and `plan_step(entry, &plan)`.
#pragma once

#include <vector>

#include "quaver/adam.h"
#include "tensor_list.h"

namespace quaver::cuda {

template <class Entry, class Plan>
struct ListOp {
  const Entry* table;
  Plan* plans;
  int* skip;
  int64_t count;
  int64_t* skipped;
};

inline int64_t rounded(int64_t bytes) { return ceil_div(bytes, 16) * 16; }

// Device memory of a call. What else an op needs follows it.
template <class Entry, class Plan>
int64_t list_bytes(int64_t count) {
  return 16 + rounded(count * int64_t(sizeof(Entry))) + rounded(count * int64_t(sizeof(Plan)));
}

// Runs in one block. A gradient that is not finite anywhere skips the step everywhere.
template <class Entry, class Plan>
__global__ void __launch_bounds__(kThreads) begin_kernel(ListOp<Entry, Plan> p) {
  bool bad = false;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads)
    bad = bad || !is_finite(*grad_amax_of(p.table[i]));
  bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) {
    *p.skip = bad;
    if (bad) ++*p.skipped;
  }
  if (bad) return;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads) plan_step(p.table[i], &p.plans[i]);
}

// Begins a call over one entry or more, in a workspace of list_bytes.
template <class Plan, class Entry>
ListOp<Entry, Plan> begin(const char* op, const std::vector<Entry>& entries, int64_t* skipped,
                          void* workspace, void* stream) {
  const auto count = static_cast<int64_t>(entries.size());
  auto* table = static_cast<char*>(workspace);
  char* skip = table + rounded(count * int64_t(sizeof(Entry)));
  ListOp<Entry, Plan> p;
  p.table = reinterpret_cast<const Entry*>(table);
  p.plans = reinterpret_cast<Plan*>(skip + 16);
  p.skip = reinterpret_cast<int*>(skip);
  p.count = count;
  p.skipped = skipped;
  upload(op, table, entries.data(), count * int64_t(sizeof(Entry)), stream);
  launch(op, begin_kernel<Entry, Plan>, 1, kThreads, stream, p);
  return p;
}

}  // namespace quaver::cuda
