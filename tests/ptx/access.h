// How instructions reach memory: every access is checked.
#pragma once

#include "machine.h"

namespace quaver::ptx {

// The memory that one lane's access of `bytes` at `address` touches.
unsigned char* reach(Warp& w, const Instruction& in, int lane, uint64_t address, uint64_t bytes,
                     Access kind);

// The address of a lane, with the instruction's displacement.
inline uint64_t address_of(const Warp& w, const Instruction& in, int lane) {
  const uint64_t base = in.a.size == 4 ? w.at<uint32_t>(in.a)[lane] : w.at<uint64_t>(in.a)[lane];
  return base + static_cast<uint64_t>(in.displacement);
}

// Addresses of another CTA's shared memory have its rank, plus one, in these bits and above.
constexpr uint32_t kClusterWindow = 1u << 24;

// The CTA that an address of shared memory names, which becomes an address there.
Cta& owner_of(Warp& w, uint32_t* address);

// Counts the request of a warp, where the machine counts.
void count_request(Warp& w, const Instruction& in, uint32_t lanes, uint64_t bytes, bool writes);

}  // namespace quaver::ptx
