#include "access.h"

#include "quaver/check.h"

namespace quaver::ptx {

namespace {

const char* name_of(Access kind) {
  return kind == Access::read ? "reads" : kind == Access::write ? "writes" : "updates";
}

unsigned char* reach_global(Warp& w, int lane, uint64_t address, uint64_t bytes, Access kind) {
  Machine& m = *w.machine;
  Range& known = m.ranges[w.pc];
  if (!known.holds(address, bytes)) {
    const std::vector<unsigned char>& parameters = m.launch->parameters;
    const auto start = reinterpret_cast<uint64_t>(parameters.data());
    const Range of_parameters = {start, start + parameters.size(), false};
    known = of_parameters.holds(address, bytes) ? of_parameters : m.memory.find(address);
    if (!known.holds(address, bytes))
      fail("thread ", w.thread(lane), " ", name_of(kind), " ", bytes,
           " bytes of global memory outside of every buffer, at ", m.memory.describe(address));
  }
  if (kind != Access::read && !known.writable)
    fail("thread ", w.thread(lane), " writes to constant memory");
  return reinterpret_cast<unsigned char*>(address);
}

// The space that a generic address lies in, and the address there.
Space resolve(Space space, uint64_t* address) {
  if (space != Space::generic) return space;
  const uint64_t window = *address & kWindowMask;
  if (window != kSharedWindow && window != kLocalWindow) return Space::global;
  *address &= ~kWindowMask;
  return window == kSharedWindow ? Space::shared : Space::local;
}

}  // namespace

void count_request(Warp& w, const Instruction& in, uint32_t lanes, uint64_t bytes, bool writes) {
  if (!w.machine->traffic) return;
  uint64_t global[kLanes], shared[kLanes];
  int globals = 0, shareds = 0;
  for_lanes(lanes, [&](int lane) {
    uint64_t address = address_of(w, in, lane);
    const Space space = resolve(in.space, &address);
    if (space == Space::global) global[globals++] = address;
    if (space == Space::shared) shared[shareds++] = address;
  });
  if (globals) count_global(w.machine->traffic, global, globals, bytes, writes);
  if (shareds) count_shared(w.machine->traffic, shared, shareds, bytes);
}

unsigned char* reach(Warp& w, const Instruction& in, int lane, uint64_t address, uint64_t bytes,
                     Access kind) {
  const Space space = resolve(in.space, &address);
  if (address % bytes != 0)
    fail("thread ", w.thread(lane), " ", name_of(kind), " ", bytes, " bytes at ", address,
         ", which is no multiple of that");
  if (space == Space::global) return reach_global(w, lane, address, bytes, kind);
  if (space == Space::shared) {
    if (address < kClusterWindow) return w.cta->shared.access(address, bytes, kind, w.thread(lane));
    fail("thread ", w.thread(lane), " ", name_of(kind),
         " another CTA's shared memory, which is not ", "supported");
  }
  const bool local = space == Space::local;
  const uint64_t size =
      local ? w.machine->program.kernel.local_bytes : w.machine->program.kernel.parameter_bytes;
  if (address > size || bytes > size - address)
    fail("thread ", w.thread(lane), " ", name_of(kind), " byte ", address, " of ", size,
         " bytes of ", local ? "local memory" : "parameters");
  if (local) return w.cta->local.data() + uint64_t(w.thread(lane)) * size + address;
  if (kind != Access::read) fail("a parameter is written");
  return const_cast<unsigned char*>(w.machine->launch->parameters.data()) + address;
}

}  // namespace quaver::ptx
