// The SIMT shim itself: what the kernels rely on, and the mistakes it must show.
#include "simt/cases.h"

using namespace quaver;
using namespace quaver::test;

namespace {

void reduce(uint32_t* to) {
  const uint32_t x = threadIdx.x * 7u % 64u;
  const uint32_t in_warp = __reduce_max_sync(0xffffffffu, x);
  uint32_t by_shuffles = x;
  for (int distance = 16; distance > 0; distance /= 2)
    by_shuffles = std::max(by_shuffles, __shfl_xor_sync(0xffffffffu, by_shuffles, distance));
  if (by_shuffles == in_warp) atomicMax(to + blockIdx.x, in_warp);
}

void rotate(int* to) {
  __shared__ int values[64];
  values[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  to[blockIdx.x * 64 + threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

void forgotten_barrier(int* to) {
  __shared__ int values[64];
  values[threadIdx.x] = int(blockIdx.x);
  to[blockIdx.x * 64 + threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

void divergent_barrier(int* to) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  *to = 1;
}

void any(int* to, unsigned who) {
  const int first = __syncthreads_or(threadIdx.x == who);
  const int second = __syncthreads_or(0);
  to[threadIdx.x] = first * 10 + second;
}

}  // namespace

TEST(warps_reduce_and_shuffle) {
  in_every_order([] {
    uint32_t wanted = 0;
    for (uint32_t t = 0; t < 64; ++t) wanted = std::max(wanted, t * 7u % 64u);
    std::vector<uint32_t> got(3, 0);
    cuda::launch("test", reduce, 3, 64, nullptr, got.data());
    for (const uint32_t x : got) CHECK_EQ(x, wanted);
  });
}

TEST(barriers_order_shared_memory) {
  in_every_order([] {
    std::vector<int> got(128, -1);
    cuda::launch("test", rotate, 2, 64, nullptr, got.data());
    for (int i = 0; i < 128; ++i) CHECK_EQ(got[i], (i % 64 + 1) % 64);
  });
}

TEST(votes_reach_all_threads) {
  in_every_order([] {
    std::vector<int> got(64, -1);
    cuda::launch("test", any, 1, 64, nullptr, got.data(), 63u);
    for (const int x : got) CHECK_EQ(x, 10);
  });
}

TEST(a_forgotten_barrier_shows) {
  std::vector<int> results[2];
  const simt::Order orders[] = {simt::Order::ascending, simt::Order::descending};
  for (int k = 0; k < 2; ++k) {
    simt::set_order(orders[k]);
    results[k].assign(128, -1);
    cuda::launch("test", forgotten_barrier, 2, 64, nullptr, results[k].data());
  }
  simt::set_order(simt::Order::ascending);
  CHECK(results[0] != results[1]);
}

TEST(a_barrier_that_a_thread_misses_is_an_error) {
  int got = 0;
  CHECK_THROWS(cuda::launch("test", divergent_barrier, 1, 64, nullptr, &got),
               "63 of 64 threads of block 0 wait");
}
