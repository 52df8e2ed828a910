// bra, ret, exit, bar; fences and hints; shfl, redux, elect.
#include <algorithm>

#include "decode.h"
#include "quaver/check.h"

namespace quaver::ptx {

namespace {

void branch(Warp& w, const Instruction& in, uint32_t lanes) {
  if (lanes == w.lanes) {
    w.next = in.target;
    return;
  }
  w.others.push_back({in.target, lanes, Wait::none, 0});
  w.lanes &= ~lanes;
  w.regroup = true;
}

void end(Warp& w, const Instruction&, uint32_t lanes) {
  w.live &= ~lanes;
  w.lanes &= ~lanes;
  w.regroup = true;
}

void nothing(Warp&, const Instruction&, uint32_t) {}

void fence_proxy(Warp& w, const Instruction&, uint32_t lanes) {
  for_lanes(lanes, [&](int i) { w.cta->shared.fence_proxy(w.thread(i)); });
}

void barrier(Warp& w, const Instruction& in, uint32_t lanes) {
  const int threads =
      in.more.empty() ? w.cta->threads : static_cast<int>(uniform(w, in.more[0], lanes));
  const uint32_t vote = in.votes ? w.predicate(in.b) : 0;
  arrive(&w, lanes, static_cast<int>(uniform(w, in.a, lanes)), threads, vote);
}

// True when all lanes that the mask names are here. Otherwise those that are wait for the rest.
bool together(Warp* w, uint32_t lanes, const Slot& mask) {
  const uint32_t named = uniform(*w, mask, lanes);
  if ((named & lanes) != lanes) fail("a lane is not in the mask of its exchange");
  if (named == lanes) return true;
  if (lanes != w->lanes) w->others.push_back({w->pc + 1, w->lanes & ~lanes, Wait::none, 0});
  w->lanes = lanes;
  w->next = w->pc;
  w->wait = Wait::lanes;
  w->regroup = true;
  return false;
}

// in.c holds the end of a segment in its low bits and its mask above.
template <bool butterfly>
void shuffle(Warp& w, const Instruction& in, uint32_t lanes) {
  if (!together(&w, lanes, in.more[0])) return;
  uint32_t values[kLanes];
  std::copy_n(w.at<uint32_t>(in.a), kLanes, values);
  uint32_t* to = w.at<uint32_t>(in.to);
  const uint32_t *b = w.at<uint32_t>(in.b), *c = w.at<uint32_t>(in.c);
  uint32_t within = 0;
  for_lanes(lanes, [&](int lane) {
    const uint32_t i = static_cast<uint32_t>(lane), segment = c[i] >> 8 & 31, clamp = c[i] & 31;
    const uint32_t last = (i & segment) | (clamp & ~segment);
    const uint32_t from = butterfly ? i ^ (b[i] & 31) : (i & segment) | (b[i] & ~segment & 31);
    const uint32_t source = from <= last ? from : i;
    if (!(lanes >> source & 1))
      fail("an exchange reads lane ", source, ", which is not in its mask");
    to[i] = values[source];
    within |= uint32_t(from <= last) << i;
  });
  w.set_predicate(in.also, lanes, within);
}

void reduce_max(Warp& w, const Instruction& in, uint32_t lanes) {
  if (!together(&w, lanes, in.more[0])) return;
  const uint32_t* values = w.at<uint32_t>(in.a);
  uint32_t most = 0;
  for_lanes(lanes, [&](int i) { most = std::max(most, values[i]); });
  uint32_t* to = w.at<uint32_t>(in.to);
  for_lanes(lanes, [=](int i) { to[i] = most; });
}

void elect(Warp& w, const Instruction& in, uint32_t lanes) {
  if (!together(&w, lanes, in.more[0])) return;
  const int leader = __builtin_ctz(lanes);
  uint32_t* to = w.at<uint32_t>(in.to);
  for_lanes(lanes, [=](int i) { to[i] = static_cast<uint32_t>(leader); });
  w.set_predicate(in.also, lanes, 1u << leader);
}

}  // namespace

bool decode_control(Decoder& d, const Statement& s, Instruction* in) {
  const std::string& op = s.opcode[0];
  if (op == "bra") {
    check_modifiers(s, {"uni"});
    in->run = branch;
  } else if (op == "ret" || op == "exit") {
    in->run = end;
  } else if (op == "bar" && (s.has("sync") || s.has("red"))) {
    in->votes = s.has("red");
    check_modifiers(s, {in->votes ? "red" : "sync", "or"});
    if (in->votes) {
      if (!s.has("or")) return false;
      check_operands(s, 3);
      in->to = d.result(s.operands[0], 0);
      in->b = d.source(s.operands[2], 0);
    }
    in->a = d.source(s.operands.at(in->votes ? 1 : 0), 4);
    if (!in->votes && s.operands.size() > 1) in->more.push_back(d.source(s.operands[1], 4));
    in->run = barrier;
  } else {
    return false;
  }
  return true;
}

// Every access is seen at once, except by the asynchronous proxy.
bool decode_fence(Decoder&, const Statement& s, Instruction* in) {
  const std::string& op = s.opcode[0];
  if (op == "setmaxnreg") {
    check_modifiers(s, {"inc", "dec", "sync", "aligned"});
    check_operands(s, 1);
    const uint64_t registers = s.operands[0].value;
    if (registers < 24 || registers > 256 || registers % 8 != 0)
      fail("24 to 256 registers in steps of 8, got ", registers);
    in->run = nothing;
    return true;
  }
  if (op == "prefetch") {
    check_modifiers(s, {"tensormap"});
    check_operands(s, 1);
    in->run = nothing;
    return true;
  }
  if (op != "fence" && op != "membar") return false;
  check_modifiers(s, {"acq_rel", "sc", "cta", "gpu", "sys", "gl", "cluster", "mbarrier_init",
                      "release", "proxy", "async", "shared::cta"});
  check_operands(s, 0);
  in->run = s.has("proxy") ? fence_proxy : nothing;
  return true;
}

bool decode_warp(Decoder& d, const Statement& s, Instruction* in) {
  const std::string& op = s.opcode[0];
  if (op == "elect") {
    check_modifiers(s, {"sync"});
    check_operands(s, 2);
    in->to = d.result(s.operands[0].parts.at(0), 4);
    in->also = d.result(s.operands[0].parts.at(1), 0);
    in->more.push_back(d.source(s.operands[1], 4));
    in->run = elect;
    return true;
  }
  const bool shuffles = op == "shfl";
  if (!shuffles && !(op == "redux" && s.has("max") && type_at(s) == Type::u32)) return false;
  check_modifiers(s, {"sync", "bfly", "idx", "max"});
  check_operands(s, shuffles ? 5 : 3);
  const Operand& to = s.operands[0];  // a register, or register|predicate: the source exists
  const bool both = to.kind == Operand::Kind::vector;
  in->run = !shuffles ? reduce_max : s.has("bfly") ? shuffle<true> : shuffle<false>;
  in->to = d.result(both ? to.parts.at(0) : to, 4);
  in->also = d.result(both ? to.parts.at(1) : Operand{}, 0);
  in->a = d.source(s.operands[1], 4);
  if (shuffles) {
    in->b = d.source(s.operands[2], 4);
    in->c = d.source(s.operands[3], 4);
  }
  in->more.push_back(d.source(s.operands.back(), 4));
  return true;
}

}  // namespace quaver::ptx
