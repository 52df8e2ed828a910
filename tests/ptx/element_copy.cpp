// cp.async without .bulk: a few bytes of global memory to shared memory, by each thread. They may
// land at any time until the mbarrier ends its phase that is told of them. (PTX ISA, 9.7.9.25.3.)
#include <cstring>

#include "access.h"
#include "decode.h"
#include "quaver/check.h"

namespace quaver::ptx {

namespace {

void land(Cta* cta, const ElementCopy& c) {
  cta->shared.release(c.to, c.bytes, Access::write);
  std::memcpy(cta->shared.access(c.to, c.bytes, Access::write, c.thread),
              reinterpret_cast<const unsigned char*>(c.from), c.bytes);
}

void copy_element(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    ElementCopy c;
    c.thread = w.thread(i);
    c.bytes = in.bytes;
    c.to = static_cast<uint32_t>(address_of(w, in, i));
    c.from = w.at<uint64_t>(in.b)[i];
    if (c.to >= kClusterWindow) fail("a copy to another CTA's shared memory");
    if (c.to % c.bytes != 0 || c.from % c.bytes != 0)
      fail("a copy of ", c.bytes, " bytes from ", c.from, " to ", c.to, ", no multiples of that");
    if (!w.machine->memory.find(c.from).holds(c.from, c.bytes))
      fail("a copy reads ", c.bytes, " bytes of global memory outside of every buffer, at ",
           w.machine->memory.describe(c.from));
    w.cta->shared.hold(c.to, c.bytes, Access::write);
    if (!w.machine->launch->timing.late_loads) land(w.cta, c);
    w.cta->copies[c.thread].push_back(c);
  });
}

// The mbarrier gets an arrival of the thread when all copies have landed that it started.
void arrive_after_copies(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    CopyGroup group;
    group.rank = w.cta->rank;
    group.barrier = static_cast<uint32_t>(address_of(w, in, i));
    group.copies.swap(w.cta->copies[w.thread(i)]);
    Mbarrier& barrier = mbarrier_at(*w.cta, group.barrier);
    if (w.machine->launch->timing.late_loads)
      w.cta->cluster->groups.push_back(std::move(group));
    else
      barrier.arrive(1);
  });
}

bool decode_arrival(Decoder& d, const Statement& s, Instruction* in) {
  check_modifiers(s, {"async", "mbarrier", "arrive", "noinc", "shared", "shared::cta"});
  check_operands(s, 1);
  if (!s.has("arrive") || !s.has("noinc")) return false;
  d.address(s.operands[0], Space::shared, in);
  in->run = arrive_after_copies;
  return true;
}

}  // namespace

bool land_group(Machine* machine) {
  for (const auto& cluster : machine->clusters()) {
    std::vector<CopyGroup>& groups = cluster->groups;
    if (groups.empty()) continue;
    const auto at = machine->launch->timing.descending ? groups.end() - 1 : groups.begin();
    const CopyGroup group = *at;
    groups.erase(at);
    Cta& cta = *cluster->ctas[group.rank];
    for (const ElementCopy& c : group.copies) land(&cta, c);
    mbarrier_at(cta, group.barrier).arrive(1);
    return true;
  }
  return false;
}

bool decode_element_copy(Decoder& d, const Statement& s, Instruction* in) {
  if (s.opcode[0] != "cp" || !s.has("async") || s.has("bulk")) return false;
  if (s.has("mbarrier")) return decode_arrival(d, s, in);
  check_modifiers(s, {"async", "ca", "cg", "shared", "shared::cta", "global", "L2::128B"});
  check_operands(s, 3);
  const Operand &from = s.operands[1], &bytes = s.operands[2];
  if (from.kind != Operand::Kind::memory || from.parts.size() != 1 || from.value != 0 ||
      bytes.kind != Operand::Kind::immediate)
    fail("operands of a form that is not supported");
  if (bytes.value != 4 && bytes.value != 8 && bytes.value != 16)
    fail("a copy of ", bytes.value, " bytes, not 4, 8 or 16");
  d.address(s.operands[0], Space::shared, in);
  in->b = d.source(from.parts[0], 8);
  in->bytes = static_cast<uint8_t>(bytes.value);
  in->run = copy_element;
  return true;
}

}  // namespace quaver::ptx
