// The CPU backend's two hooks: one selects the vector code, the other the threads.
#pragma once

#include <cstdint>

namespace quaver::cpu {

// Instruction sets of the vector loops, best first, that this build has and this machine can run.
// All give the same bits; the choice exists for tests and benches.
const char* const* available_isas(int* count);
const char* isa();
void set_isa(const char* name);  // throws Error on a name that is not available

// Runs body(begin, end) over [0, n) in pieces of at least `grain`, in any order and concurrently.
// The default runs in the calling thread; the torch binding installs torch's own thread pool.
using ParallelBody = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t n, int64_t grain, void* context, ParallelBody body);
void set_parallel_for(ParallelFor parallel_for);

}  // namespace quaver::cpu
