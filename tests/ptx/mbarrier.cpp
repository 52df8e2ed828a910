// mbarrier: init, arrive, expect_tx and waits, in shared memory of the CTA or of its cluster.
#include "access.h"
#include "decode.h"
#include "quaver/check.h"

namespace quaver::ptx {

void Mbarrier::end_phase() {
  if (pending != 0 || bytes != 0) return;
  ++phase;
  pending = expected;
}

void Mbarrier::arrive(int count) {
  if (count > pending) fail("an mbarrier gets more arrivals than the ", expected, " it expects");
  pending -= count;
  end_phase();
}

void Mbarrier::expect(int64_t more) { bytes += more; }

void Mbarrier::complete(int64_t count) {
  bytes -= count;
  end_phase();
}

Mbarrier& mbarrier_at(Cta& cta, uint32_t address) {
  const auto found = cta.mbarriers.find(address);
  if (found == cta.mbarriers.end()) fail("there is no mbarrier at byte ", address);
  return found->second;
}

namespace {

Mbarrier& named(Warp& w, const Instruction& in, int lane) {
  auto address = static_cast<uint32_t>(address_of(w, in, lane));
  Cta& cta = owner_of(w, &address);
  return mbarrier_at(cta, address);
}

void initialize(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    const auto address = static_cast<uint32_t>(address_of(w, in, i));
    const auto count = static_cast<int>(w.at<uint32_t>(in.b)[i]);
    if (address % 8 != 0 || address + 8 > w.cta->shared.size())
      fail("an mbarrier at byte ", address, " of shared memory");
    if (count < 1 || count >= 1 << 20) fail("an mbarrier that expects ", count, " arrivals");
    Mbarrier m;
    m.expected = m.pending = count;
    w.cta->mbarriers[address] = m;
  });
}

void arrive_once(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) { named(w, in, i).arrive(1); });
}

void arrive_counted(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes,
            [&](int i) { named(w, in, i).arrive(static_cast<int>(w.at<uint32_t>(in.b)[i])); });
}

void expect(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) { named(w, in, i).expect(w.at<uint32_t>(in.b)[i]); });
}

void arrive_and_expect(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    Mbarrier& m = named(w, in, i);
    m.expect(w.at<uint32_t>(in.b)[i]);
    m.arrive(1);
  });
}

// Lanes whose phase has not ended ask again after the others' turns, as hardware suspends them.
void try_wait(Warp& w, const Instruction& in, uint32_t lanes) {
  uint32_t done = 0;
  for_lanes(lanes, [&](int i) {
    const uint32_t parity = w.at<uint32_t>(in.b)[i] & 1;
    done |= uint32_t((named(w, in, i).phase & 1) != parity) << i;
  });
  w.set_predicate(in.to, lanes, done);
  if (done != lanes) poll(&w, w.pc + 1);
}

}  // namespace

bool decode_mbarrier(Decoder& d, const Statement& s, Instruction* in) {
  if (s.opcode[0] != "mbarrier") return false;
  check_modifiers(s, {"init", "arrive", "expect_tx", "try_wait", "parity", "release", "acquire",
                      "cta", "cluster", "shared::cta", "shared::cluster", "shared"});
  const bool waits = s.has("try_wait"), arrives = s.has("arrive");
  if (waits && !s.has("parity")) return false;
  size_t next = 0;
  if (waits) in->to = d.result(s.operands.at(next), 0);
  if (arrives && s.operands.at(next).kind != Operand::Kind::sink)
    fail("its state is not supported");
  next += waits || arrives;
  d.address(s.operands.at(next++), Space::shared, in);
  const bool counted = s.operands.size() > next;
  if (counted) in->b = d.source(s.operands[next++], 4);
  if (waits && s.operands.size() > next) ++next;  // for how long hardware may suspend the thread
  check_operands(s, next);
  if (!counted && !(arrives && !s.has("expect_tx"))) fail("an operand is missing");
  if (s.has("init"))
    in->run = initialize;
  else if (waits)
    in->run = try_wait;
  else if (s.has("expect_tx"))
    in->run = arrives ? arrive_and_expect : expect;
  else
    in->run = counted ? arrive_counted : arrive_once;
  return true;
}

}  // namespace quaver::ptx
