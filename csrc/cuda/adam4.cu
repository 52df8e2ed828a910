// AdamW with moments of 4 bits over all parameters (Li, Chen & Zhu, arXiv 2309.01507). A thread has
// 16 elements of a row at a time, so that eight threads have a group of 128: flat elements, or a
// panel's where the second moment has numbers of columns (adam4_scales.h). The maxima of rank-1
// second moments are found by a launch before, in the workspace. Whether the step is skipped, its
// number and its hyperparameters are read on the device.
#include "../check_adam4.h"
#include "adam4_scales.h"
#include "list_op.h"
#include "master.h"
#include "nibbles.h"

namespace quaver::cuda {
namespace {

static_assert(kBlockSpan % kGroup == 0 && kGroup / kVector <= kWarp, "a warp has whole groups");

constexpr int kMembers = int(kGroup) / kVector;  // threads of a group

// The table entry of a parameter.
struct Entry {
  Adam4Parameter p;
  float* maxima;  // of a rank-1 second moment, as this step will store them
  int64_t numel;
  int64_t scales;  // their count
  int64_t first;   // block of this parameter
  Panels panels;
  bool aligned, codes_aligned;
};

struct Plan {
  AdamStep step;
  Dither dither;
  float grad_scale;
};

using Problem = ListOp<Entry, Plan>;

QUAVER_DEVICE const float* grad_amax_of(const Entry& e) { return e.p.grad_amax; }

QUAVER_DEVICE void plan_step(const Entry& e, Plan* plan) {
  const Adam4Parameter& a = e.p;
  const double* h = a.hyper;
  plan->step = adam_step(h[0], h[1], h[2], h[3], h[4], next_step(*a.step));
  plan->dither = make_dither(a.seed, static_cast<uint64_t>(*a.step));
  plan->grad_scale = a.grad_scale != nullptr ? *a.grad_scale : 1.0f;
}

// A thread's elements: n from the tensor's i-th on, none where n <= 0. Those of a panel lie in a
// row of it, of so many; flat ones need no row.
struct Place {
  int64_t i, n;
  int row, rows;
};

QUAVER_DEVICE bool has_panels(const Entry& e) { return e.panels.chunk_bits != 0; }

QUAVER_DEVICE Place flat_place(const Entry& e) {
  const int64_t i = (blockIdx.x - e.first) * kBlockSpan + int64_t(threadIdx.x) * kVector;
  return {i, e.numel - i, 0, 0};
}

QUAVER_DEVICE Place first_place(const Entry& e, const Panel& panel) {
  const int row = strand_of(e.panels);
  return {(panel.row + row) * e.panels.cols + panel.col + chunk_of(e.panels) * kVector,
          row < panel.rows ? kVector : 0, row, panel.rows};
}

// Whether a thread of the warp has a row.
QUAVER_DEVICE bool is_there(const Entry& e, const Place& at) {
  return at.row - (int(threadIdx.x % kWarp) >> e.panels.chunk_bits) < at.rows;
}

QUAVER_DEVICE void go_on(const Entry& e, Place& at) {
  const int strands = strands_of(e.panels);
  at.row += strands;
  at.i += strands * e.panels.cols;
  at.n = at.row < at.rows ? kVector : 0;
}

QUAVER_DEVICE Panel panel_of(const Entry& e) {
  return panel_at(e.panels, static_cast<uint32_t>(blockIdx.x - e.first));
}

QUAVER_DEVICE void fill(PanelNumbers& to, const Entry& e, const Panel& panel,
                        const float* numbers) {
  fill(to, panel, e.panels, e.p.second, e.p.shape, numbers, e.numel / e.panels.cols);
}

// The scales of flat elements or of a panel's.
template <bool kPanels>
QUAVER_DEVICE void scales_of(const Entry& e, const PanelNumbers& numbers, const float* scales,
                             const Place& at, float (&scale)[kVector]) {
  if (kPanels) return scales_of_row(numbers, e.panels, at.row, e.p.second, scale);
  load_scales(e.p.second, e.p.shape, e.numel, scales, at.i, at.n, scale);
}

// This step's second moment of a thread's elements, of which `v` has the scales, or the values
// where it is factored; 0 beyond the tensor.
QUAVER_DEVICE void next_second(const Entry& e, const Plan& plan, int64_t i, int64_t n,
                               const float (&grad)[kVector], float (&v)[kVector]) {
  if (e.p.second == Second::factor) return;
  const Codes codes = load_codes(e.p.exp_avg_sq, i, n, e.codes_aligned);
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    v[j] = next_exp_avg_sq(plan.step, decode_linear4(code_at(codes, j)) * v[j], grad[j]);
}

// Whether all elements of the warp's threads are there and aligned.
template <bool kPanels>
QUAVER_DEVICE bool is_whole(const Entry& e, const Place& at) {
  const int lane = int(threadIdx.x % kWarp);
  if (kPanels)  // all of a panel are aligned
    return at.row + ((kWarp - 1 - lane) >> e.panels.chunk_bits) < at.rows;
  return e.aligned && e.numel - at.i + lane * kVector >= kWarp * kVector;
}

QUAVER_DEVICE void load_grad(const Entry& e, const Plan& plan, const Place& at, bool whole,
                             float (&grad)[kVector]) {
  const DType type = e.p.grad.dtype;
  const AnyPacked bits = load_paired(e.p.grad.data, type, at.i, at.n, e.aligned, whole);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    float g[kQuad];
    decode_any(type, bits, q, plan.grad_scale, g);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) grad[q * kQuad + j] = g[j];
  }
}

// Raises a maximum that is not negative. Most values are below it, and a read is cheaper than an
// atomic operation.
QUAVER_DEVICE void raise(float* most, uint32_t bits) {
  if (bits > *reinterpret_cast<volatile uint32_t*>(most))
    atomicMax(reinterpret_cast<uint32_t*>(most), bits);
}

QUAVER_DEVICE void find_flat_maxima(const Entry& e, const Plan& plan) {
  const Place at = flat_place(e);
  if (at.n <= 0) return;
  const Shape& shape = e.p.shape;
  float grad[kVector], v[kVector];
  load_grad(e, plan, at, is_whole<false>(e, at), grad);
  load_scales(Second::rank1, shape, e.numel, e.p.exp_avg_sq_scale, at.i, at.n, v);
  next_second(e, plan, at.i, at.n, grad, v);
  float* columns = e.maxima + column_slots(shape);
  Walk walk = walk_from(shape, at.i);
  uint32_t most = 0;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (j >= at.n) continue;
    const uint32_t bits = range_bits(v[j]);
    most = max_bits(most, bits);
    raise(columns + walk.column, bits);
    const int64_t row = walk.row;
    if (!next(walk, shape) && j + 1 < kVector && j + 1 < at.n) continue;
    for_slices(shape, row, [&](int64_t slot) { raise(e.maxima + slot, most); });
    most = 0;
  }
}

// Raises the maxima of a panel's rows and returns those of a thread's columns over its rows.
QUAVER_DEVICE void find_rows_maxima(const Entry& e, const Plan& plan, const Panel& panel,
                                    const PanelNumbers& old, uint32_t (&columns)[kVector]) {
#pragma unroll 1
  for (Place at = first_place(e, panel); is_there(e, at); go_on(e, at)) {
    float grad[kVector], v[kVector];
    load_grad(e, plan, at, is_whole<true>(e, at), grad);
    scales_of_row(old, e.panels, at.row, Second::rank1, v);
    next_second(e, plan, at.i, at.n, grad, v);
    uint32_t most = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const uint32_t bits = at.n > 0 ? range_bits(v[j]) : 0;
      columns[j] = max_bits(columns[j], bits);
      most = max_bits(most, bits);
    }
    for (int d = chunks_of(e.panels) / 2; d > 0; d /= 2)
      most = max_bits(most, __shfl_xor_sync(kAllLanes, most, d));
    if (chunk_of(e.panels) == 0 && at.n > 0)
      for_slices(e.p.shape, panel.row + at.row,
                 [&](int64_t slot) { raise(e.maxima + slot, most); });
  }
}

__global__ void __launch_bounds__(kThreads, 2) maxima_kernel(Problem p) {
  __shared__ Held<Entry> held;
  __shared__ Held<Plan> held_plan;
  __shared__ PanelNumbers old;
  __shared__ uint4 most[kThreads * kQuads];  // of each thread's columns
  if (*p.skip) return;
  const int64_t owner = owner_of(p.table, p.count, blockIdx.x);
  const Entry& entry = p.table[owner];
  if (entry.p.second != Second::rank1) return;
  if (!has_panels(entry)) return find_flat_maxima(entry, p.plans[owner]);
  hold(held, entry);
  hold(held_plan, p.plans[owner]);
  const Panel panel = panel_of(entry);
  fill(old, entry, panel, entry.p.exp_avg_sq_scale);
  __syncthreads();
  const Entry& e = of(held);
  uint32_t columns[kVector] = {};
  find_rows_maxima(e, of(held_plan), panel, old, columns);
#pragma unroll
  for (int q = 0; q < kQuads; ++q)
    most[place_of_four(threadIdx.x, q)] =
        uint4{columns[4 * q], columns[4 * q + 1], columns[4 * q + 2], columns[4 * q + 3]};
  __syncthreads();
  float* maxima = e.maxima + column_slots(e.p.shape) + panel.col;
  const auto* words = reinterpret_cast<const uint32_t*>(most);
  const int width = chunks_of(e.panels) * kVector;
  for (int c = threadIdx.x; c < width; c += kThreads) {
    uint32_t bits = 0;
    for (int at = c; at < kThreads * kVector; at += width)
      bits = max_bits(bits, words[place_of_column(at)]);
    raise(maxima + c, bits);
  }
}

// The largest magnitude among the threads of a group. All threads of a warp must call it.
QUAVER_DEVICE float amax_of_group(const float (&x)[kVector], int64_t n) {
  uint32_t most = amax_bits(x);
  if (n < kVector || most > 0x7f7fffffu) {  // an edge, or what is not finite
    most = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) most = max_bits(most, j < n ? range_bits(x[j]) : 0);
  }
#pragma unroll
  for (int d = 1; d < kMembers; d *= 2) most = max_bits(most, __shfl_xor_sync(kAllLanes, most, d));
  return bit_cast<float>(most);
}

QUAVER_DEVICE void store_first(const Entry& e, const float (&m)[kVector], int64_t i, int64_t n) {
  const float scale = amax_of_group(m, n);
  if (n <= 0) return;
  if (threadIdx.x % kMembers == 0) e.p.exp_avg_scale[i / kGroup] = scale;
  Codes codes = {0, 0};
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    if (j < n) put_code(codes, j, encode_dynamic4(over_scale(m[j], scale)));
  store_codes(e.p.exp_avg, i, codes, n, e.codes_aligned);
}

template <bool kPanels>
QUAVER_DEVICE void store_second(const Entry& e, const PanelNumbers& now, const float (&v)[kVector],
                                const Place& at) {
  float scale[kVector];
  if (!kPanels && e.p.second == Second::block) {
    const float of_group = amax_of_group(v, at.n);
#pragma unroll
    for (int j = 0; j < kVector; ++j) scale[j] = of_group;
    if (at.n > 0 && threadIdx.x % kMembers == 0) e.p.exp_avg_sq_scale[at.i / kGroup] = of_group;
  } else {
    scales_of<kPanels>(e, now, e.maxima, at, scale);
  }
  if (at.n <= 0) return;
  Codes codes = {0, 0};
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    if (j < at.n) put_code(codes, j, encode_linear4(over_scale(v[j], scale[j])));
  store_codes(e.p.exp_avg_sq, at.i, codes, at.n, e.codes_aligned);
}

// Steps a thread's elements.
template <bool kPanels>
QUAVER_DEVICE void step_part(const Entry& e, const Plan& plan, const Place& at,
                             const PanelNumbers& old, const PanelNumbers& now) {
  const bool whole = is_whole<kPanels>(e, at);
  const int64_t i = at.i, n = at.n;
  float grad[kVector], m[kVector], v[kVector];
  load_grad(e, plan, at, whole, grad);
  scales_of<kPanels>(e, old, e.p.exp_avg_sq_scale, at, v);
  next_second(e, plan, i, n, grad, v);
  const Codes codes = load_codes(e.p.exp_avg, i, n, e.codes_aligned);
  const float scale = n > 0 ? e.p.exp_avg_scale[i / kGroup] : 0.0f;
  const Master master = {e.p.weight.data, e.p.remainder, e.p.weight.dtype,
                         e.p.stochastic,  e.aligned,     whole};
  MasterBits bits = load_master(master, i, n);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    float w[kQuad];
    decode_master(master, bits, q, w);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const int k = q * kQuad + j;
      const float first = decode_dynamic4(code_at(codes, k)) * scale;
      const AdamElement element = adamw_under(plan.step, {w[j], first, v[k]}, grad[k]);
      w[j] = element.weight;
      m[k] = element.exp_avg;
    }
    encode_master(master, plan.dither, i, q, w, bits);
  }
  store_master(master, bits, i, n);
  store_first(e, m, i, n);
  if (e.p.second != Second::factor) store_second<kPanels>(e, now, v, at);
}

__global__ void __launch_bounds__(kThreads, 2) update_kernel(Problem p) {
  __shared__ Held<Entry> held;
  __shared__ Held<Plan> held_plan;
  __shared__ PanelNumbers old, now;
  if (*p.skip) return;
  const int64_t owner = owner_of(p.table, p.count, blockIdx.x);
  const Entry& entry = p.table[owner];
  if (!has_panels(entry))
    return step_part<false>(entry, p.plans[owner], flat_place(entry), old, now);
  hold(held, entry);
  hold(held_plan, p.plans[owner]);
  const Panel panel = panel_of(entry);
  fill(old, entry, panel, entry.p.exp_avg_sq_scale);
  if (entry.p.second == Second::rank1) fill(now, entry, panel, entry.maxima);
  __syncthreads();
  const Entry& e = of(held);
#pragma unroll 1
  for (Place at = first_place(e, panel); is_there(e, at); go_on(e, at))
    step_part<true>(e, of(held_plan), at, old, now);
}

// A block stores one parameter's maxima and counts its step.
__global__ void __launch_bounds__(kThreads) end_kernel(Problem p) {
  if (*p.skip) return;
  const Entry& e = p.table[blockIdx.x];
  if (e.p.second == Second::rank1)
    for (int64_t k = threadIdx.x; k < e.scales; k += kThreads)
      e.p.exp_avg_sq_scale[k] = e.maxima[k];
  if (threadIdx.x == 0) *e.p.step = next_step(*e.p.step);
}

Entry make_entry(const Adam4Parameter& p, int64_t first, float* maxima) {
  Entry e = {};
  e.p = p;
  e.maxima = maxima;
  e.numel = p.weight.numel();
  e.scales = second_scale_count(p.second, p.shape, e.numel);
  e.first = first;
  e.aligned = is_aligned(p.weight.data) && is_aligned(p.grad.data) && is_aligned(p.remainder.data);
  e.codes_aligned = is_aligned(p.exp_avg) && is_aligned(p.exp_avg_sq);
  e.panels = make_panels(p.shape, p.second, e.numel, e.aligned && e.codes_aligned);
  return e;
}

int64_t block_count(const Entry& e) {
  return e.panels.chunk_bits != 0 ? panel_count(e.panels, e.numel) : ceil_div(e.numel, kBlockSpan);
}

int64_t maxima_bytes(const Adam4Parameter& p) {
  if (p.second != Second::rank1) return 0;
  return rounded(second_scale_count(p.second, p.shape, p.weight.numel()) * 4);
}

}  // namespace

int64_t adam4_workspace_bytes(const Adam4Parameter* parameters, int64_t count) {
  int64_t bytes = list_bytes<Entry, Plan>(count);
  for (int64_t i = 0; i < count; ++i) bytes += maxima_bytes(parameters[i]);
  return bytes;
}

void adam4(const Adam4Parameter* parameters, int64_t count, int64_t* skipped, void* workspace,
           void* stream) {
  const char* op = "adam_4bit_";
  if (count == 0) return;
  char* maxima = static_cast<char*>(workspace) + list_bytes<Entry, Plan>(count);
  char* end = maxima;
  std::vector<Entry> entries;
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    check_adam4(parameters[i]);
    entries.push_back(make_entry(parameters[i], blocks, reinterpret_cast<float*>(end)));
    blocks += block_count(entries.back());
    end += maxima_bytes(parameters[i]);
  }
  clear(op, maxima, end - maxima, stream);
  const Problem p = begin<Plan>(op, entries, skipped, workspace, stream);
  if (end > maxima && blocks > 0) launch(op, maxima_kernel, blocks, kThreads, stream, p);
  if (blocks > 0) launch(op, update_kernel, blocks, kThreads, stream, p);
  launch(op, end_kernel, count, kThreads, stream, p);
}

}  // namespace quaver::cuda
