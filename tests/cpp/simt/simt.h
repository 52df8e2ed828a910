// Runs CUDA kernels on the host: the threads of a block are fibers, blocks run one after another.
// csrc/cuda/launch.h includes this file where the compiler is not nvcc. It is strict: a barrier
// that some thread of the block never reaches is an error, and threads and blocks run in an order
// that a test chooses, so that a missing barrier shows as a difference between orders. The programs
// test_cuda_*_ptx execute the kernel's PTX instead (tests/ptx), from the same launches.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/launch.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(...)
#define __grid_constant__
#define QUAVER_DEVICE [[maybe_unused]] static inline

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace quaver::simt {

extern dim3 thread_index, block_index, block_size, grid_size;

enum class Order { ascending, descending, shuffled };
void set_order(Order order);

// Options of a test for launches: grids as large as a real device's need not run whole.
struct Control {
  std::function<std::vector<int64_t>(int64_t blocks)> chosen;  // blocks that run; empty: all
  // Called for each launch, and with 0 blocks for each clearing of memory.
  std::function<void(const char* op, int64_t blocks)> seen;
  int64_t multiprocessors = 1;  // few, so that loops over the grid take several turns
  bool cut_sums = false;        // the interpreter sums products as a tensor core does
};
extern Control control;

struct Argument {
  const void* value;
  size_t bytes;
};

struct Launch {
  const char* op;
  int64_t blocks;
  int threads;
  void (*body)(void*);  // the kernel for one thread, with its arguments in `context`
  void* context;
  const void* kernel;  // its address, by which PTX is found
  std::vector<Argument> arguments;
};

// Runs the body for every thread of every block, or the interpreter where one is linked.
void run(const Launch& launch);

using Interpreter = void (*)(const Launch& launch, const std::vector<int64_t>& blocks,
                             const std::vector<int>& warps);
extern Interpreter interpreter;

// Memory of which a kernel may touch this part alone, where an interpreter checks it.
extern void (*narrow)(const void* data, size_t bytes);

// Waits for all threads of the block.
void sync_block();

// Gives `value` to the lanes in `mask` and waits for theirs; the result is indexed by lane and
// valid until the next exchange.
const uint64_t* exchange(uint32_t mask, uint64_t value);

int lane();

template <class T>
T shuffle(uint32_t mask, T value, int from, int width) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* all = exchange(mask, bits);
  const int first = lane() / width * width;
  if (from >= first && from < first + width && (mask >> from & 1)) bits = all[from];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace quaver::simt

#define threadIdx quaver::simt::thread_index
#define blockIdx quaver::simt::block_index
#define blockDim quaver::simt::block_size
#define gridDim quaver::simt::grid_size

inline void __syncthreads() { quaver::simt::sync_block(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { quaver::simt::exchange(mask, 0); }
int __syncthreads_or(int predicate);

template <class T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
  return quaver::simt::shuffle(mask, value, quaver::simt::lane() / width * width + from % width,
                               width);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int distance, int width = 32) {
  return quaver::simt::shuffle(mask, value, quaver::simt::lane() ^ distance, width);
}
uint32_t __reduce_max_sync(uint32_t mask, uint32_t value);
float __fadd_rz(float a, float b);  // rounds toward zero

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

inline uint32_t atomicMax(uint32_t* to, uint32_t value) {
  const uint32_t before = *to;
  *to = std::max(before, value);
  return before;
}

inline int32_t atomicAdd(int32_t* to, int32_t value) {
  const int32_t before = *to;
  *to = before + value;
  return before;
}

namespace quaver::cuda {

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads, void*,
            const Arguments&... arguments) {
  check_blocks(op, blocks);
  std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...>* values;
  } call{kernel, &values};
  const auto body = [](void* context) {
    const Call& c = *static_cast<Call*>(context);
    std::apply(c.kernel, *c.values);
  };
  std::vector<simt::Argument> all;
  std::apply([&](auto&... value) { (all.push_back({&value, sizeof(value)}), ...); }, values);
  simt::run({op, blocks, threads, body, &call, reinterpret_cast<const void*>(kernel), all});
}

inline void clear(const char* op, void* memory, int64_t bytes, void*) {
  if (bytes == 0) return;
  if (simt::control.seen) simt::control.seen(op, 0);
  std::memset(memory, 0, static_cast<size_t>(bytes));
}

inline int64_t multiprocessors(const char*) { return simt::control.multiprocessors; }

}  // namespace quaver::cuda
