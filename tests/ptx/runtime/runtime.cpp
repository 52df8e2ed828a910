// A CUDA runtime of which kernels run on the interpreter: what the object files of the matrix
// products call, so that the host code that ships (parameters, tensor maps, workspace, launch) is
// what the tests run. It is linked instead of libcudart.
#include "runtime.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <string>

#include "../allocations.h"
#include "../driver.h"
#include "../tensor_map.h"
#include "quaver/check.h"

namespace quaver::ptx {

LaunchOptions launch_options;

namespace {

std::map<const void*, std::string>& kernel_names() {
  static auto* names = new std::map<const void*, std::string>;
  return *names;
}

uint32_t element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32: return 4;
    default: fail("tensor map: data type ", int(type), " is not supported");
  }
}

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const TensorMap made =
      encode({element_bytes(type), rank, reinterpret_cast<uint64_t>(address), sizes, strides, box,
              element_strides, interleave != CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle});
  std::memset(map, 0, sizeof(*map));
  std::memcpy(map, &made, sizeof(made));
  return CUDA_SUCCESS;
}

// The CTAs of the launch's clusters.
Dim cluster_of(const cudaLaunchConfig_t& config) {
  Dim cluster;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension)
      fail("ptx: launch attribute ", int(config.attrs[i].id), " is not supported");
    const auto& d = config.attrs[i].val.clusterDim;
    cluster = {d.x, d.y, d.z};
  }
  return cluster;
}

void launch(const cudaLaunchConfig_t& config, const void* kernel, void** arguments) {
  const Unregistered own;
  const auto found = kernel_names().find(kernel);
  if (found == kernel_names().end()) fail("ptx: a launch of a kernel that was never registered");
  Launch l;
  l.grid = {config.gridDim.x, config.gridDim.y, config.gridDim.z};
  l.cluster = cluster_of(config);
  l.threads = static_cast<int>(config.blockDim.x * config.blockDim.y * config.blockDim.z);
  l.dynamic_shared = config.dynamicSmemBytes;
  l.timing = launch_options.timing;
  l.turn = launch_options.turn;
  const int64_t clusters = l.grid.count() / l.cluster.count();
  for (int64_t i = 0; i < clusters; ++i) l.chosen.push_back(i);
  l.resident = launch_options.resident > 0 ? launch_options.resident : static_cast<int>(clusters);
  launch_options.clusters = clusters;
  for (int i = 0; i < (l.threads + kLanes - 1) / kLanes; ++i) l.warps.push_back(i);
  if (launch_options.shuffle) launch_options.shuffle(&l.warps);
  shared_driver().run(found->second, std::move(l), arguments);
}

}  // namespace
}  // namespace quaver::ptx

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  quaver::ptx::kernel_names()[host] = device;
}
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return 1; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** args) {
  quaver::ptx::launch(*config, kernel, args);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  constexpr int kMost = 227 * 1024;  // of shared memory that a block on sm_90 may have
  return attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value <= kMost
             ? cudaSuccess
             : cudaErrorInvalidValue;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *entry = known ? reinterpret_cast<void*>(quaver::ptx::encode_tiled) : nullptr;
  if (found) *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return known ? cudaSuccess : cudaErrorNotSupported;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaErrorNotSupported; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the runtime on the interpreter"; }

}  // extern "C"
