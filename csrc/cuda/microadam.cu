// MicroAdam over all parameters (Modoranu et al., arXiv 2405.15593, algorithm 1). A block of
// threads steps 4096 flat elements of one parameter: it finds the largest of the gradient with its
// feedback, encodes the rest in 4 bits, sums the ring's rows in shared memory and writes the
// weight. Error blocks that are no part of 4096 elements take two launches, between which their
// ranges are joined in the workspace. Whether the step is skipped, its number and its
// hyperparameters are read on the device.
#include "../check_microadam.h"
#include "list_op.h"
#include "master.h"
#include "microadam_block.h"

namespace quaver::cuda {
namespace {

// The table entry of a parameter.
struct Entry {
  MicroAdamParameter p;
  Range* joined;  // of each error block, where those cross top blocks
  int64_t numel;
  int64_t first;  // block of this parameter, of its table
  bool aligned, error_aligned;
};

struct Plan {
  MicroAdamStep step;
  Dither dither;
  float grad_scale;
};

using Problem = ListOp<Entry, Plan>;

enum class Part { keep, store, all };

QUAVER_DEVICE const float* grad_amax_of(const Entry& e) { return e.p.grad_amax; }

QUAVER_DEVICE void plan_step(const Entry& e, Plan* plan) {
  const MicroAdamParameter& m = e.p;
  plan->step = micro_adam_step(m.hyper, m.window, next_step(*m.step));
  plan->dither = make_dither(m.seed, static_cast<uint64_t>(*m.step));
  plan->grad_scale = m.grad_scale != nullptr ? *m.grad_scale : 1.0f;
}

// The elements of this thread: `n` from `i` on, none where n <= 0, in block `b` of the parameter.
// `whole`: all elements of the warp's threads are there and aligned (pairs.h).
struct Place {
  int64_t b, i, n;
  bool whole;
};

QUAVER_DEVICE void add_feedback(const Entry& e, const Plan& plan, const Place& at,
                                float (&a)[kVector]) {
  const MicroAdamParameter& p = e.p;
  const bool any = at.n > 0;
  const bf16* range = p.range + (any ? 2 * (at.i / p.error_block) : 0);
  const ErrorCodec codec = any ? error_codec(range[0], range[1]) : ErrorCodec{0.0f, 0.0f};
  const Codes codes = load_codes(p.error, at.i, at.n, e.error_aligned);
  const AnyPacked grad = load_paired(p.grad.data, p.grad.dtype, at.i, at.n, e.aligned, at.whole);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    float g[kQuad];
    decode_any(p.grad.dtype, grad, q, plan.grad_scale, g);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const float error = decode_error(codec, code_at(codes, q * kQuad + j));
      a[q * kQuad + j] = with_feedback(plan.step, g[j], error);
    }
  }
}

// Subtracts the row that the launch before has kept.
QUAVER_DEVICE void subtract_kept(float (&a)[kVector], float* dense, const int16_t* index,
                                 const bf16* value, int64_t kept) {
  for (int k = threadIdx.x; k < kPadded; k += kThreads) dense[k] = 0.0f;
  __syncthreads();
  for (int64_t k = threadIdx.x; k < kept; k += kThreads)
    dense[padded(index[k] & (int(kTopBlock) - 1))] = decode(value[k]);
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kVector; ++j) a[j] -= dense[padded(int(threadIdx.x) * kVector + j)];
  __syncthreads();  // `dense` may be used again
}

// The range of the values' error block, whole where it lies inside of this block; else it is joined
// with those of other blocks in memory.
QUAVER_DEVICE void join_ranges(const Entry& e, const Place& at, const Range& mine) {
  const int64_t first = at.b * kTopBlock / e.p.error_block;
  const int64_t block = at.n > 0 ? at.i / e.p.error_block : -1;
#pragma unroll
  for (int k = 0; k < 2; ++k) {  // an error block is longer, so that at most two meet here
    const bool here = block == first + k;
    const uint32_t low = block_max(here ? mine.low : 0), high = block_max(here ? mine.high : 0);
    if (threadIdx.x != 0 || (low == 0 && high == 0)) continue;
    atomicMax(&e.joined[first + k].low, low);
    atomicMax(&e.joined[first + k].high, high);
  }
}

// Sums the rows of the ring. Every thread may meet every place, so rows take turns.
QUAVER_DEVICE void sum_rows(const Entry& e, const MicroAdamStep& s, const Place& at, int64_t kept,
                            float* first, float* second) {
  for (int k = threadIdx.x; k < kPadded; k += kThreads) first[k] = second[k] = 0.0f;
  __syncthreads();
  for (int64_t r = 0; r < s.rows; ++r) {
    const RowWeight weight = row_weight(s, r);
    const int64_t row = r * e.p.row + at.b * e.p.kept;
    for (int64_t k = threadIdx.x; k < kept; k += kThreads) {
      const int i = padded(e.p.index[row + k] & (int(kTopBlock) - 1));
      const SparseMoments z = add_value({first[i], second[i]}, weight, decode(e.p.value[row + k]));
      first[i] = z.first;
      second[i] = z.second;
    }
    __syncthreads();
  }
}

QUAVER_DEVICE void update_weight(const Entry& e, const Plan& plan, const Place& at,
                                 const ErrorCodec& codec, const Codes& codes, const float* first,
                                 const float* second) {
  const MicroAdamParameter& p = e.p;
  const Master master = {p.weight.data, p.remainder, p.weight.dtype,
                         p.stochastic,  e.aligned,   at.whole};
  const MicroAdamStep& s = plan.step;
  MasterBits bits = load_master(master, at.i, at.n);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    float w[kQuad];
    decode_master(master, bits, q, w);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const int k = q * kQuad + j, place = padded(int(threadIdx.x) * kVector + k);
      const float update = sparse_update(s, {first[place], second[place]});
      const float error = s.feedback != 0.0f ? decode_error(codec, code_at(codes, k)) : 0.0f;
      w[j] = micro_adam_weight(s, w[j], update, error);
    }
    encode_master(master, plan.dither, at.i, q, w, bits);
  }
  store_master(master, bits, at.i, at.n);
}

template <Part kPart>
__global__ void __launch_bounds__(kThreads, 2) block_kernel(Problem p) {
  __shared__ float first[kPadded], second[kPadded];
  __shared__ Held<Entry> held;
  __shared__ Held<Plan> held_plan;
  if (*p.skip) return;
  const int64_t owner = owner_of(p.table, p.count, blockIdx.x);
  hold(held, p.table[owner]);
  hold(held_plan, p.plans[owner]);
  __syncthreads();
  const Entry& e = of(held);
  const Plan& plan = of(held_plan);
  const int64_t numel = e.numel;
  Place at;
  at.b = blockIdx.x - e.first;
  at.i = at.b * kTopBlock + int64_t(threadIdx.x) * kVector;
  at.n = numel - at.i;
  at.whole = e.aligned && numel - at.b * kTopBlock >= kTopBlock;
  const int64_t kept = kept_of(numel, e.p.row, e.p.kept, at.b);
  const int64_t row = plan.step.slot * e.p.row + at.b * e.p.kept;
  float a[kVector];
  add_feedback(e, plan, at, a);
  if (kPart == Part::store)
    subtract_kept(a, first, e.p.index + row, e.p.value + row, kept);
  else
    keep_largest(a, at.n, e.p.index + row, e.p.value + row, static_cast<uint32_t>(kept));
  if (kPart == Part::keep) return join_ranges(e, at, range_of(a, at.n));
  const int64_t block = at.n > 0 ? at.i / e.p.error_block : 0;
  Range range;
  if (kPart == Part::all) {
    const int threads = int(e.p.error_block) / kVector;
    range = range_of_block(range_of(a, at.n), threads);
    if (at.n > 0 && int(threadIdx.x) % threads == 0) {
      e.p.range[2 * block] = low_of(range);
      e.p.range[2 * block + 1] = high_of(range);
    }
  } else {
    range = e.joined[block];
  }
  const ErrorCodec codec = error_codec(low_of(range), high_of(range));
  const Codes codes = encode_codes(codec, a, at.n);
  store_codes(e.p.error, at.i, codes, at.n, e.error_aligned);
  sum_rows(e, plan.step, at, kept, first, second);
  update_weight(e, plan, at, codec, codes, first, second);
}

// Stores the joined ranges: a thread has one top block, in which at most one error block begins.
__global__ void __launch_bounds__(kThreads) range_kernel(Problem p, int64_t blocks) {
  if (*p.skip) return;
  const int64_t chunk = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (chunk >= blocks) return;
  const Entry& e = p.table[owner_of(p.table, p.count, chunk)];
  const int64_t begin = (chunk - e.first) * kTopBlock, size = e.p.error_block;
  const int64_t block = begin / size + (begin % size != 0);
  if (block * size >= begin + kTopBlock || block * size >= e.numel) return;
  e.p.range[2 * block] = low_of(e.joined[block]);
  e.p.range[2 * block + 1] = high_of(e.joined[block]);
}

// Runs in one block.
__global__ void __launch_bounds__(kThreads) end_kernel(Problem p) {
  if (*p.skip) return;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads)
    *p.table[i].p.step = next_step(*p.table[i].p.step);
}

Entry make_entry(const MicroAdamParameter& p, int64_t first, Range* joined) {
  Entry e = {};
  e.p = p;
  e.joined = joined;
  e.numel = p.weight.numel();
  e.first = first;
  e.aligned = is_aligned(p.weight.data) && is_aligned(p.grad.data) && is_aligned(p.remainder.data);
  e.error_aligned = is_aligned(p.error);
  return e;
}

int64_t joined_bytes(const MicroAdamParameter& p) {
  if (is_inside(p.error_block)) return 0;
  return rounded(error_block_count(p.weight.numel(), p.error_block) * int64_t(sizeof(Range)));
}

}  // namespace

int64_t micro_adam_workspace_bytes(const MicroAdamParameter* parameters, int64_t count) {
  int64_t bytes = list_bytes<Entry, Plan>(count);
  for (int64_t i = 0; i < count; ++i) bytes += joined_bytes(parameters[i]);
  return bytes;
}

void micro_adam(const MicroAdamParameter* parameters, int64_t count, int64_t* skipped,
                void* workspace, void* stream) {
  const char* op = "micro_adam_";
  if (count == 0) return;
  char* joined = static_cast<char*>(workspace) + list_bytes<Entry, Plan>(count);
  char* end = joined;
  std::vector<Entry> inside, crossing;
  int64_t inside_blocks = 0, crossing_blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    const MicroAdamParameter& p = parameters[i];
    check_micro_adam(p);
    const bool is_crossing = !is_inside(p.error_block);
    int64_t& blocks = is_crossing ? crossing_blocks : inside_blocks;
    auto* ranges = reinterpret_cast<Range*>(end);
    (is_crossing ? crossing : inside).push_back(make_entry(p, blocks, ranges));
    blocks += top_block_count(p.weight.numel());
    end += joined_bytes(p);
  }
  const auto first_crossing = static_cast<int64_t>(inside.size());
  inside.insert(inside.end(), crossing.begin(), crossing.end());
  clear(op, joined, end - joined, stream);
  const Problem p = begin<Plan>(op, inside, skipped, workspace, stream);
  Problem part = p;
  part.count = first_crossing;
  if (inside_blocks > 0) launch(op, block_kernel<Part::all>, inside_blocks, kThreads, stream, part);
  part.table += first_crossing;
  part.plans += first_crossing;
  part.count = count - first_crossing;
  if (crossing_blocks > 0) {
    launch(op, block_kernel<Part::keep>, crossing_blocks, kThreads, stream, part);
    launch(op, block_kernel<Part::store>, crossing_blocks, kThreads, stream, part);
    launch(op, range_kernel, ceil_div(crossing_blocks, kThreads), kThreads, stream, part,
           crossing_blocks);
  }
  launch(op, end_kernel, 1, kThreads, stream, p);
}

}  // namespace quaver::cuda
