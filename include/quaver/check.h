// Errors that name the op, what it wanted and what it got.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace quaver {

struct Error : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

// The ops library calls this where torch has no memory for a result. The Python module sets it, to
// throw what Python shows as torch.OutOfMemoryError.
using OutOfMemoryHandler = void (*)(const char* reason);
void set_out_of_memory(OutOfMemoryHandler handler);

}  // namespace quaver

// QUAVER_CHECK(k % 16 == 0, "gemm: K must be a multiple of 16, got ", k)
#define QUAVER_CHECK(condition, ...)               \
  do {                                             \
    if (!(condition)) ::quaver::fail(__VA_ARGS__); \
  } while (0)
