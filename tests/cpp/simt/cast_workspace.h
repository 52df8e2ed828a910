// The workspace of CUDA's casts, for their tests.
#pragma once

#include "cases.h"
#include "quaver/quantize.h"

namespace quaver::test {

// Device memory of a cast, dirty as an allocator gives it.
struct CastWorkspace : Buffer {
  CastWorkspace(int64_t rows, int64_t cols) : Buffer(cuda::cast_workspace_bytes(rows, cols)) {}
  ScaleSource with(ScaleSource source) {
    source.workspace = data();
    return source;
  }
};

}  // namespace quaver::test
