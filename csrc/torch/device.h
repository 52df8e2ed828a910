// The device of an op: the CPU, or the current stream of its tensors' CUDA device.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

#include "bridge.h"

#if defined(QUAVER_HAVE_CUDA)
// Defined by libtorch_cuda. Weak, so that the library loads on a torch without it too.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace quaver::binding {

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return "another device";
}

// CUDA devices have an index; all other devices have -1.
inline bool same_device(const Tensor& a, const Tensor& b) {
  const int32_t index = a.get_device_index();
  return index == b.get_device_index() && (index >= 0 || a.is_cpu() == b.is_cpu());
}

// Every op's tensors are on one device. An empty tensor in a list stands for none, on any
// device.
inline void check_device(const char* op, const Tensor& first, const char* name, const Tensor& t) {
  QUAVER_CHECK(same_device(first, t) || t.numel() == 0, op, ": ", name, " must be on ",
               device_name(first), " like the rest, got ", device_name(t));
}

inline void check_device(const char* op, const Tensor& first, const char* name,
                         const OptionalTensor& t) {
  if (t.has_value()) check_device(op, first, name, *t);
}

inline void check_device(const char* op, const Tensor& first, const char* name,
                         const std::vector<Tensor>& list) {
  for (const Tensor& t : list) check_device(op, first, name, t);
}

// A tensor that is in an op's lists twice would be written for two parameters at once, and threads
// would decide what it holds.
inline void check_distinct(const char* op,
                           std::initializer_list<const std::vector<Tensor>*> written) {
  std::vector<const void*> places;
  for (const std::vector<Tensor>* list : written)
    for (const Tensor& t : *list)
      if (t.numel() > 0) places.push_back(t.data_ptr());
  std::sort(places.begin(), places.end());
  QUAVER_CHECK(std::adjacent_find(places.begin(), places.end()) == places.end(), op,
               ": a tensor is there twice among those that are written; give each parameter its "
               "own weight, states and step");
}

// Memory for one call, of the caching allocator, which may hand it out again after this call's
// kernels: later work is ordered behind them in the same stream.
inline Tensor workspace(const Tensor& like, int64_t bytes) {
  return empty(like, {bytes}, ScalarType::Byte);
}

// Calls on_cpu(), or on_cuda(stream) with the device of `t` current. A build without CUDA never
// instantiates the second.
template <class OnCpu, class OnCuda>
void on_device([[maybe_unused]] const char* op, [[maybe_unused]] const Tensor& t,
               [[maybe_unused]] OnCpu on_cpu, [[maybe_unused]] OnCuda on_cuda) {
#if defined(QUAVER_SIMT)
  // Kernels that are compiled for the host take the CPU's tensors (tests/cpp/launches).
  on_cuda(static_cast<void*>(nullptr));
#else
#if defined(QUAVER_HAVE_CUDA)
  if (t.is_cuda()) {
    QUAVER_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op,
                 ": tensors on cuda, but this torch has no CUDA");
    const int32_t index = t.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(index);
    void* stream = nullptr;
    QUAVER_CHECK(aoti_torch_get_current_cuda_stream(index, &stream) == 0, op,
                 ": torch has no current stream for cuda:", index);
    on_cuda(stream);
    return;
  }
#endif
  QUAVER_CHECK(t.is_cpu(), op, ": no code for ", device_name(t), " in this build of quaver");
  on_cpu();
#endif
}

}  // namespace quaver::binding
