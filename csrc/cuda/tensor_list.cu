#include <algorithm>
#include <cstring>

#include "tensor_list.h"

namespace quaver::cuda {
namespace {

// Kernel arguments may take 32 KB from CUDA 12.1 on.
constexpr int64_t kPageBytes = 16384;

struct Page {
  uint4 part[kPageBytes / sizeof(uint4)];
};

__global__ void upload_kernel(uint4* to, const __grid_constant__ Page page, int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) to[i] = page.part[i];
}

}  // namespace

void upload(const char* op, void* to, const void* from, int64_t bytes, void* stream) {
  Page page;
  for (int64_t at = 0; at < bytes; at += kPageBytes) {
    const int64_t n = std::min(kPageBytes, bytes - at);
    std::memcpy(&page, static_cast<const char*>(from) + at, static_cast<size_t>(n));
    launch(op, upload_kernel, 1, kThreads, stream,
           reinterpret_cast<uint4*>(static_cast<char*>(to) + at), page,
           static_cast<int>(ceil_div(n, sizeof(uint4))));
  }
}

}  // namespace quaver::cuda
