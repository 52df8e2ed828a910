// Registers every allocation of this program, so that kernels may touch these and nothing else.
#pragma once

#include "memory.h"

namespace quaver::ptx {

// Allocations, the stack, static data, and what `mmap` gave.
Memory& host_memory();

// Within the life of one of these, allocations of its thread are the interpreter's own: kernels may
// not touch them.
class Unregistered {
 public:
  Unregistered();
  ~Unregistered();
  Unregistered(const Unregistered&) = delete;
};

}  // namespace quaver::ptx
