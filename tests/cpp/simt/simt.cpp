#include "simt.h"

#include <ucontext.h>

#include <cfenv>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace quaver::simt {

dim3 thread_index, block_index, block_size, grid_size;
Control control;
Interpreter interpreter = nullptr;
void (*narrow)(const void*, size_t) = nullptr;

namespace {

constexpr size_t kStack = 128 * 1024;
constexpr int kSlots = 4;  // exchanges of one warp that may be in flight, and one to clear

struct Warp {
  uint64_t values[kSlots][32];
  uint32_t arrived[kSlots];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  uint64_t exchanges;  // done so far
  uint64_t barriers;
  uint32_t mask;  // of the exchange it waits for; 0: none
  bool at_barrier, done;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  ucontext_t scheduler;
  int current = 0, threads = 0;
  uint64_t arrivals;  // at barriers, of all threads together
  void (*body)(void*);
  void* argument;
  std::exception_ptr problem;  // thrown by a kernel
} block;

Order order_of_run = Order::ascending;

Fiber& self() { return block.fibers[block.current]; }

void yield() { swapcontext(&self().context, &block.scheduler); }

void enter() {
  try {
    block.body(block.argument);
  } catch (...) {
    block.problem = std::current_exception();
  }
  self().done = true;
  yield();
}

bool ready(const Fiber& f, const Warp& warp) {
  if (f.at_barrier) return block.arrivals >= f.barriers * block.threads;
  if (f.mask != 0) return (warp.arrived[f.exchanges % kSlots] & f.mask) == f.mask;
  return true;
}

void prepare(Fiber& f) {
  f.exchanges = f.barriers = 0;
  f.mask = 0;
  f.at_barrier = f.done = false;
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, enter, 0);
}

// Runs each thread that can run up to its next barrier or exchange; false if none could.
bool run_threads(const int* begin, const int* end, int* left) {
  bool progress = false;
  for (const int* t = begin; t != end; ++t) {
    Fiber& f = block.fibers[*t];
    if (f.done || !ready(f, block.warps[*t / 32])) continue;
    progress = true;
    block.current = *t;
    thread_index.x = static_cast<unsigned>(*t);
    swapcontext(&block.scheduler, &f.context);
    *left -= f.done;
    if (block.problem) std::rethrow_exception(std::exchange(block.problem, nullptr));
  }
  return progress;
}

void run_block(const std::vector<int>& order) {
  block.arrivals = 0;
  for (Warp& warp : block.warps) std::fill(warp.arrived, warp.arrived + kSlots, 0u);
  for (int t = 0; t < block.threads; ++t) prepare(block.fibers[t]);
  // Each warp goes as far ahead of the others as it can: what only luck protects then breaks.
  const auto* first = order.data();
  for (int left = block.threads; left > 0;) {
    bool progress = false;
    for (int begin = 0; begin < block.threads;) {
      int end = begin + 1;
      while (end < block.threads && first[end] / 32 == first[begin] / 32) ++end;
      while (run_threads(first + begin, first + end, &left)) progress = true;
      begin = end;
    }
    if (!progress)
      throw std::runtime_error("simt: " + std::to_string(left) + " of " +
                               std::to_string(block.threads) + " threads of block " +
                               std::to_string(block_index.x) +
                               " wait at a barrier or exchange that the others never reach");
  }
}

std::vector<int64_t> ordered(int64_t n) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (order_of_run == Order::descending) std::reverse(order.begin(), order.end());
  if (order_of_run == Order::shuffled)
    std::shuffle(order.begin(), order.end(), std::mt19937(static_cast<unsigned>(n)));
  return order;
}

// Threads by warps, both in the order of the run.
std::vector<int> ordered_threads(int threads) {
  std::vector<int> result;
  for (const int64_t warp : ordered((threads + 31) / 32))
    for (const int64_t lane : ordered(32))
      if (warp * 32 + lane < threads) result.push_back(static_cast<int>(warp * 32 + lane));
  return result;
}

}  // namespace

void set_order(Order order) { order_of_run = order; }

void run(const Launch& l) {
  if (l.threads < 1 || l.threads > 1024)
    throw std::runtime_error("simt: cannot launch blocks of " + std::to_string(l.threads) +
                             " threads");
  if (control.seen) control.seen(l.op, l.blocks);
  const std::vector<int64_t> blocks = control.chosen ? control.chosen(l.blocks) : ordered(l.blocks);
  if (interpreter) {
    std::vector<int> warps;
    for (const int64_t warp : ordered((l.threads + 31) / 32))
      warps.push_back(static_cast<int>(warp));
    return interpreter(l, blocks, warps);
  }
  if (static_cast<int>(block.fibers.size()) < l.threads) block.fibers.resize(l.threads);
  block.warps.resize((l.threads + 31) / 32);
  block.threads = l.threads;
  block.body = l.body;
  block.argument = l.context;
  grid_size.x = static_cast<unsigned>(l.blocks);
  block_size.x = static_cast<unsigned>(l.threads);
  const std::vector<int> order = ordered_threads(l.threads);
  for (const int64_t b : blocks) {
    block_index.x = static_cast<unsigned>(b);
    run_block(order);
  }
}

void sync_block() {
  Fiber& f = self();
  ++f.barriers;
  ++block.arrivals;
  f.at_barrier = true;
  yield();
  f.at_barrier = false;
}

int lane() { return block.current % 32; }

const uint64_t* exchange(uint32_t mask, uint64_t value) {
  Fiber& f = self();
  Warp& warp = block.warps[block.current / 32];
  const uint32_t bit = 1u << lane();
  if (!(mask & bit)) throw std::runtime_error("simt: a lane is not in the mask of its exchange");
  const int slot = f.exchanges % kSlots;
  warp.arrived[(slot + 2) % kSlots] &= ~bit;  // the exchange before last: everyone has left it
  warp.values[slot][lane()] = value;
  warp.arrived[slot] |= bit;
  f.mask = mask;
  yield();
  f.mask = 0;
  ++f.exchanges;
  return warp.values[slot];
}

}  // namespace quaver::simt

uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) {
  const uint64_t* all = quaver::simt::exchange(mask, value);
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) result = std::max(result, static_cast<uint32_t>(all[i]));
  return result;
}

float __fadd_rz(float a, float b) {
  std::fesetround(FE_TOWARDZERO);
  const volatile float x = a, y = b;  // read behind the change of rounding
  const volatile float sum = x + y;
  std::fesetround(FE_TONEAREST);
  return sum;
}

int __syncthreads_or(int predicate) {
  static int result;
  quaver::simt::sync_block();  // nobody still reads the last one
  result = 0;
  quaver::simt::sync_block();
  result |= predicate != 0;
  quaver::simt::sync_block();
  return result;
}
