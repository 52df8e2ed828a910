// AdamW with moments of 4 bits over all parameters (Li, Chen & Zhu, arXiv 2309.01507). A thread has
// 16 flat elements, so that eight threads have a group of 128. The maxima of rank-1 second moments
// are found by a launch before, in the workspace. Whether the step is skipped, its number and its
// hyperparameters are read on the device.
#include "../check_adam4.h"
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

// Where a thread is in a matrix of all axes but the last by the last.
struct Walk {
  int64_t row, column;
};

QUAVER_DEVICE Walk walk_from(const Shape& shape, int64_t i) {
  return {i / columns_of(shape), i % columns_of(shape)};
}

// Goes on to the next element; returns whether it begins a row.
QUAVER_DEVICE bool next(Walk& at, const Shape& shape) {
  if (++at.column < columns_of(shape)) return false;
  at.column = 0;
  ++at.row;
  return true;
}

// The scales of a thread's elements in a second moment, or the values of a factored one.
QUAVER_DEVICE void load_scales(const Entry& e, const float* scales, int64_t i, int64_t n,
                               float (&scale)[kVector]) {
  const Adam4Parameter& p = e.p;
  if (p.second == Second::block) {
    const float of_group = n > 0 ? scales[i / kGroup] : 0.0f;
#pragma unroll
    for (int j = 0; j < kVector; ++j) scale[j] = of_group;
    return;
  }
  const bool rank1 = p.second == Second::rank1;
  const int64_t rows = e.numel / columns_of(p.shape);
  Walk at = walk_from(p.shape, i);
  float of_row = 0.0f;
  const float* columns = nullptr;
  bool begins = true;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    scale[j] = 0.0f;
    if (j >= n) continue;
    if (begins) {
      of_row = rank1 ? row_scale(p.shape, scales, at.row) : scales[at.row];
      columns =
          rank1 ? scales + column_slots(p.shape) : factor_columns(p.shape, scales, rows, at.row);
    }
    const float of_column = columns[at.column];
    scale[j] = rank1 ? least_of(of_row, of_column) : of_row * of_column;
    begins = next(at, p.shape);
  }
}

// This step's second moment of a thread's elements; 0 beyond the tensor.
QUAVER_DEVICE void next_second(const Entry& e, const Plan& plan, int64_t i, int64_t n,
                               const float (&grad)[kVector], float (&v)[kVector]) {
  load_scales(e, e.p.exp_avg_sq_scale, i, n, v);
  if (e.p.second == Second::factor) return;
  const Codes codes = load_codes(e.p.exp_avg_sq, i, n, e.codes_aligned);
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    v[j] = next_exp_avg_sq(plan.step, decode_linear4(code_at(codes, j)) * v[j], grad[j]);
}

// Whether all elements of the warp of the thread whose first is i are there and aligned.
QUAVER_DEVICE bool is_whole(const Entry& e, int64_t i) {
  const int64_t first = i - int64_t(threadIdx.x % kWarp) * kVector;
  return e.aligned && e.numel - first >= kWarp * kVector;
}

QUAVER_DEVICE void load_grad(const Entry& e, const Plan& plan, int64_t i, int64_t n,
                             float (&grad)[kVector]) {
  const DType type = e.p.grad.dtype;
  const AnyPacked bits = load_paired(e.p.grad.data, type, i, n, e.aligned, is_whole(e, i));
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

__global__ void __launch_bounds__(kThreads, 2) maxima_kernel(Problem p) {
  if (*p.skip) return;
  const int64_t owner = owner_of(p.table, p.count, blockIdx.x);
  const Entry& e = p.table[owner];
  if (e.p.second != Second::rank1) return;
  const Shape& shape = e.p.shape;
  const int64_t i = (blockIdx.x - e.first) * kBlockSpan + int64_t(threadIdx.x) * kVector;
  const int64_t n = e.numel - i;
  if (n <= 0) return;
  float grad[kVector], v[kVector];
  load_grad(e, p.plans[owner], i, n, grad);
  next_second(e, p.plans[owner], i, n, grad, v);
  float* columns = e.maxima + column_slots(shape);
  Walk at = walk_from(shape, i);
  uint32_t most = 0;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (j >= n) continue;
    const uint32_t bits = range_bits(v[j]);
    most = max_bits(most, bits);
    raise(columns + at.column, bits);
    const int64_t row = at.row;
    if (!next(at, shape) && j + 1 < kVector && j + 1 < n) continue;
    for_slices(shape, row, [&](int64_t slot) { raise(e.maxima + slot, most); });
    most = 0;
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

QUAVER_DEVICE void store_second(const Entry& e, const float (&v)[kVector], int64_t i, int64_t n) {
  float scale[kVector];
  if (e.p.second == Second::block) {
    const float of_group = amax_of_group(v, n);
#pragma unroll
    for (int j = 0; j < kVector; ++j) scale[j] = of_group;
    if (n > 0 && threadIdx.x % kMembers == 0) e.p.exp_avg_sq_scale[i / kGroup] = of_group;
  } else {
    load_scales(e, e.maxima, i, n, scale);
  }
  if (n <= 0) return;
  Codes codes = {0, 0};
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    if (j < n) put_code(codes, j, encode_linear4(over_scale(v[j], scale[j])));
  store_codes(e.p.exp_avg_sq, i, codes, n, e.codes_aligned);
}

__global__ void __launch_bounds__(kThreads, 2) update_kernel(Problem p) {
  if (*p.skip) return;
  const int64_t owner = owner_of(p.table, p.count, blockIdx.x);
  const Entry& e = p.table[owner];
  const Plan& plan = p.plans[owner];
  const int64_t i = (blockIdx.x - e.first) * kBlockSpan + int64_t(threadIdx.x) * kVector;
  const int64_t n = e.numel - i;
  float grad[kVector], m[kVector], v[kVector];
  load_grad(e, plan, i, n, grad);
  next_second(e, plan, i, n, grad, v);
  const Codes codes = load_codes(e.p.exp_avg, i, n, e.codes_aligned);
  const float scale = n > 0 ? e.p.exp_avg_scale[i / kGroup] : 0.0f;
  const Master master = {e.p.weight.data, e.p.remainder, e.p.weight.dtype,
                         e.p.stochastic,  e.aligned,     is_whole(e, i)};
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
  if (e.p.second != Second::factor) store_second(e, v, i, n);
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
  return e;
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
    blocks += ceil_div(entries.back().numel, kBlockSpan);
    end += maxima_bytes(parameters[i]);
  }
  clear(op, maxima, end - maxima, stream);
  const Problem p = begin<Plan>(op, entries, skipped, workspace, stream);
  if (end > maxima && blocks > 0) launch(op, maxima_kernel, blocks, kThreads, stream, p);
  if (blocks > 0) launch(op, update_kernel, blocks, kThreads, stream, p);
  launch(op, end_kernel, count, kThreads, stream, p);
}

}  // namespace quaver::cuda
