// What requests of warps cost in memory: sectors of 32 bytes of global memory, and passes over the
// 32 banks of shared memory, each beside the least that its bytes could take.
#pragma once

#include <cstdint>

namespace quaver::ptx {

struct Traffic {
  uint64_t read = 0, written = 0;           // bytes of global memory that instructions named
  uint64_t sectors = 0, least_sectors = 0;  // of the requests, each for itself
  uint64_t passes = 0, least_passes = 0;    // over the banks of shared memory
};

// One request: the addresses of `count` lanes, each of `bytes`.
void count_global(Traffic* traffic, const uint64_t* addresses, int count, uint64_t bytes,
                  bool writes);
void count_shared(Traffic* traffic, const uint64_t* addresses, int count, uint64_t bytes);

}  // namespace quaver::ptx
