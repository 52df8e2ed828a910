// Threads for the CPU backend: one hook, and the reduction that the casts share.
#pragma once

#include <atomic>
#include <cstdint>

#include "quaver/cpu.h"

namespace quaver::cpu {

// Values per piece of work: small enough to balance, large enough to pay for a thread.
constexpr int64_t kGrain = 32768;
// The same where a value costs a few instructions: a smaller matrix is done before a second thread
// has begun, and beside other processes that thread may not run at all for a while.
constexpr int64_t kLightGrain = 16 * kGrain;

ParallelFor current_parallel_for();

template <class Body>
void parallel_for(int64_t n, int64_t grain, Body& body) {
  if (n <= 0) return;
  current_parallel_for()(n, grain < 1 ? 1 : grain, &body,
                         [](void* context, int64_t begin, int64_t end) {
                           (*static_cast<Body*>(context))(begin, end);
                         });
}

// Maximum of non-negative f32 bit patterns from several threads; exact, so order does not matter.
class AtomicAmax {
 public:
  void add(uint32_t bits) {
    uint32_t seen = bits_.load(std::memory_order_relaxed);
    while (seen < bits && !bits_.compare_exchange_weak(seen, bits, std::memory_order_relaxed)) {
    }
  }
  uint32_t bits() const { return bits_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint32_t> bits_{0};
};

}  // namespace quaver::cpu
