// The one way to start a kernel: on the caller's stream, never the default one, and a refusal
// becomes an Error that names the op. Compiled as plain C++ (no nvcc), the kernels run on the host
// under the SIMT shim of tests/cpp/simt, which has the same three functions.
#pragma once

#include <cstdint>

#include "quaver/check.h"

namespace quaver::cuda {

inline void check_blocks(const char* op, int64_t blocks) {
  QUAVER_CHECK(blocks > 0 && blocks <= 0x7fffffff, op,
               ": a launch takes 1 to 2^31 - 1 blocks, got ", blocks);
}

}  // namespace quaver::cuda

#if !defined(__CUDACC__)
#include "simt.h"
#else
#include <cuda_runtime.h>

#define QUAVER_DEVICE static __device__ __forceinline__

namespace quaver::cuda {

// Leaves no error behind for the next CUDA user in the process.
inline void check_status(const char* op, const char* what, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  fail(op, ": ", what, ": ", cudaGetErrorString(status));
}

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads,
            void* stream, const Arguments&... arguments) {
  check_blocks(op, blocks);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  check_status(op, "CUDA refused a launch",
               cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

inline void clear(const char* op, void* memory, int64_t bytes, void* stream) {
  if (bytes == 0) return;  // the memory may be none
  check_status(
      op, "CUDA refused to clear memory",
      cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)));
}

// Streaming multiprocessors of the current device; grids of loops are made to fit them.
inline int64_t multiprocessors(const char* op) {
  int device = 0, count = 0;
  check_status(op, "no current CUDA device", cudaGetDevice(&device));
  check_status(op, "the CUDA device does not answer",
               cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

}  // namespace quaver::cuda
#endif
