// Wrappers of the stable ABI for the binding: they keep torch's own reason in every error, and free
// its strings.
#pragma once

#include <torch/headeronly/util/shim_utils.h>

#include <cstring>

#include "quaver/check.h"

// torch has this function since 2.13. It is weak, so that the library loads on an older torch,
// which writes the reason to stderr only.
extern "C" __attribute__((weak, visibility("default"))) const char*
torch_exception_get_what_without_backtrace();

namespace quaver::binding {

// Throws for memory that torch could not give (quaver/check.h); returns where no handler is set.
void throw_out_of_memory(const char* reason);

// Throws a RuntimeError, as torch does.
[[noreturn]] inline void torch_failed(const char* call) {
  const char* reason = nullptr;
  if (torch_exception_get_what_without_backtrace != nullptr)
    reason = torch_exception_get_what_without_backtrace();
  if (reason == nullptr || *reason == '\0') reason = call;
  if (std::strstr(reason, "out of memory") != nullptr) throw_out_of_memory(reason);
  throw std::runtime_error(reason);
}

// A string argument.
struct Word {
  std::string text;
};

}  // namespace quaver::binding

// The headers below check each call by this macro, and would keep only the call's own text.
#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call)        \
  if ((call) != TORCH_SUCCESS) {            \
    ::quaver::binding::torch_failed(#call); \
  }

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>

// torch's conversion to std::string allocates a copy that nothing frees.
template <>
struct torch::stable::detail::ToImpl<quaver::binding::Word> {
  static quaver::binding::Word call(StableIValue value, uint64_t, bool) {
    const auto handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    quaver::binding::Word word = {std::string(data, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return word;
  }
};

// Registers a file's ops by its function register_ops(library), once a backend.
#if defined(QUAVER_HAVE_CUDA)
#define QUAVER_OPS(register_ops)                                 \
  STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) { register_ops(m); } \
  STABLE_TORCH_LIBRARY_IMPL(quaver, CUDA, m) { register_ops(m); }
#else
#define QUAVER_OPS(register_ops) \
  STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) { register_ops(m); }
#endif
