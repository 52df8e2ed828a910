// cp.async without .bulk: a few bytes of global memory to shared memory, by each thread. They may
// land at any time until the mbarrier ends its phase that is told of them, or until their thread
// waits for their group. (PTX ISA, 9.7.9.25.3.)
#include <cstring>

#include "access.h"
#include "decode.h"
#include "quaver/check.h"

namespace quaver::ptx {

namespace {

void land(Cta* cta, const ElementCopy& c) {
  unsigned char* to = cta->shared.end_copy(c.to, c.bytes, c.thread);
  if (c.read > 0) std::memcpy(to, reinterpret_cast<const unsigned char*>(c.from), c.read);
  std::memset(to + c.read, 0, c.bytes - c.read);
}

// Copies that read nothing still write their zeros.
void count_copies(Warp& w, const Instruction& in, uint32_t lanes) {
  if (!w.machine->traffic) return;
  uint64_t from[kLanes], to[kLanes];
  int reads = 0, writes = 0;
  for_lanes(lanes, [&](int i) {
    to[writes++] = address_of(w, in, i);
    if (in.c.size == 0 || w.at<uint32_t>(in.c)[i] > 0) from[reads++] = w.at<uint64_t>(in.b)[i];
  });
  if (reads > 0) count_global(w.machine->traffic, from, reads, in.bytes, false);
  count_shared(w.machine->traffic, to, writes, in.bytes);
}

void copy_element(Warp& w, const Instruction& in, uint32_t lanes) {
  count_copies(w, in, lanes);
  for_lanes(lanes, [&](int i) {
    ElementCopy c;
    c.thread = w.thread(i);
    c.bytes = in.bytes;
    c.to = static_cast<uint32_t>(address_of(w, in, i));
    c.from = w.at<uint64_t>(in.b)[i];
    c.read = in.c.size != 0 ? w.at<uint32_t>(in.c)[i] : c.bytes;
    if (c.read > c.bytes) fail("a copy of ", c.bytes, " bytes that reads ", c.read);
    if (c.to >= kClusterWindow) fail("a copy to another CTA's shared memory");
    if (c.to % c.bytes != 0 || c.from % c.bytes != 0)
      fail("a copy of ", c.bytes, " bytes from ", c.from, " to ", c.to, ", no multiples of that");
    if (c.read > 0 && !w.machine->memory.find(c.from).holds(c.from, c.read))
      fail("a copy reads ", c.read, " bytes of global memory outside of every buffer, at ",
           w.machine->memory.describe(c.from));
    w.cta->shared.begin_copy(c.to, c.bytes, c.thread);
    // Without an mbarrier nobody may look before the wait, so nothing tells early from late.
    if (w.machine->program.asynchronous && !w.machine->launch->timing.late_loads) land(w.cta, c);
    w.cta->copies[c.thread].open.push_back(c);
  });
}

void commit_copies(Warp& w, const Instruction&, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    CopyQueue& queue = w.cta->copies[w.thread(i)];
    queue.groups.push_back(std::move(queue.open));
    queue.open.clear();
  });
}

void wait_copies(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    auto& groups = w.cta->copies[w.thread(i)].groups;
    for (; groups.size() > static_cast<size_t>(in.displacement); groups.pop_front())
      for (const ElementCopy& c : groups.front()) land(w.cta, c);
  });
}

// The mbarrier gets an arrival of the thread when all copies have landed that it started.
void arrive_after_copies(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    CopyGroup group;
    group.rank = w.cta->rank;
    group.barrier = static_cast<uint32_t>(address_of(w, in, i));
    group.copies.swap(w.cta->copies[w.thread(i)].open);
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

bool decode_group(const Statement& s, Instruction* in) {
  check_modifiers(s, {"async", "commit_group", "wait_group"});
  const bool waits = s.has("wait_group");
  check_operands(s, waits);
  if (waits && s.operands[0].kind != Operand::Kind::immediate)
    fail("a number that is no immediate");
  if (waits) in->displacement = static_cast<int64_t>(s.operands[0].value);
  in->run = waits ? wait_copies : commit_copies;
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
  if (s.has("commit_group") || s.has("wait_group")) return decode_group(s, in);
  check_modifiers(s, {"async", "ca", "cg", "shared", "shared::cta", "global", "L2::128B"});
  check_operands(s, s.operands.size() == 4 ? 4 : 3);
  const Operand &from = s.operands[1], &bytes = s.operands[2];
  if (from.kind != Operand::Kind::memory || from.parts.size() != 1 || from.value != 0 ||
      bytes.kind != Operand::Kind::immediate)
    fail("operands of a form that is not supported");
  if (bytes.value != 4 && bytes.value != 8 && bytes.value != 16)
    fail("a copy of ", bytes.value, " bytes, not 4, 8 or 16");
  if (s.has("cg") && bytes.value != 16) fail("a copy past L1 of ", bytes.value, " bytes, not 16");
  if (s.operands.size() == 4) in->c = d.source(s.operands[3], 4);
  d.address(s.operands[0], Space::shared, in);
  in->b = d.source(from.parts[0], 8);
  in->bytes = static_cast<uint8_t>(bytes.value);
  in->run = copy_element;
  return true;
}

}  // namespace quaver::ptx
