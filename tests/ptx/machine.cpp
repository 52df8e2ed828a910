#include "machine.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <sstream>

#include "quaver/check.h"

namespace quaver::ptx {

namespace {

constexpr size_t kAlign = 64;
constexpr unsigned char kPoison = 0xdb;  // of registers that nothing has written

unsigned char* aligned(std::vector<uint64_t>* storage) {
  const auto start = reinterpret_cast<uintptr_t>(storage->data());
  return reinterpret_cast<unsigned char*>((start + kAlign - 1) / kAlign * kAlign);
}

uint32_t special_value(const std::string& name, const Warp& w, int lane, const Launch& launch) {
  const auto thread = static_cast<uint32_t>(w.thread(lane));
  if (name == "%tid.x") return thread;
  if (name == "%ntid.x") return static_cast<uint32_t>(launch.threads);
  if (name == "%ctaid.x") return static_cast<uint32_t>(w.cta->index);
  if (name == "%nctaid.x") return static_cast<uint32_t>(launch.blocks);
  if (name == "%laneid") return static_cast<uint32_t>(lane);
  if (name == "%warpid") return static_cast<uint32_t>(w.index);
  if (name == "%tid.y" || name == "%tid.z" || name == "%ctaid.y" || name == "%ctaid.z") return 0;
  if (name == "%ntid.y" || name == "%ntid.z" || name == "%nctaid.y" || name == "%nctaid.z")
    return 1;
  fail("ptx: the special register ", name, " is not supported");
}

std::string described(const Statement& s) {
  return "line " + std::to_string(s.line) + ": " + s.text;
}

}  // namespace

Machine::Machine(const Program& program_, const Memory& memory_)
    : program(program_), memory(memory_) {
  counts_.executed.assign(program.code.size(), 0);
}

void Machine::run(const Launch& launch_) {
  if (launch_.threads < 1 || launch_.threads > 1024)
    fail("ptx: cannot launch blocks of ", launch_.threads, " threads");
  launch = &launch_;
  ranges.assign(program.code.size(), Range{});
  cta_.threads = launch_.threads;
  prepare();
  for (const int64_t block : launch_.chosen) {
    start(block);
    run_cta();
  }
  counts_.instructions = 0;
  for (const uint64_t n : counts_.executed) counts_.instructions += n;
}

void Machine::prepare() {
  cta_.warps.resize((cta_.threads + kLanes - 1) / kLanes);
  auto* constants = const_cast<uint64_t*>(program.constants.data());  // no result goes there
  for (size_t i = 0; i < cta_.warps.size(); ++i) {
    Warp& w = cta_.warps[i];
    w.cta = &cta_;
    w.machine = this;
    w.index = static_cast<int>(i);
    if (w.storage.empty()) {
      w.storage.resize((program.register_bytes + 2 * kAlign) / sizeof(uint64_t));
      std::memset(w.storage.data(), kPoison, w.storage.size() * sizeof(uint64_t));
    }
    w.banks[0] = aligned(&w.storage);
    w.banks[1] = reinterpret_cast<unsigned char*>(constants);
  }
}

void Machine::start(int64_t block) {
  cta_.index = block;
  cta_.shared.start(program.kernel.shared_bytes);
  cta_.local.assign(program.kernel.local_bytes * cta_.threads, kPoison);
  for (Barrier& b : cta_.barriers) b = {};
  for (Warp& w : cta_.warps) {
    const int threads = std::min(kLanes, cta_.threads - w.index * kLanes);
    w.live = w.lanes = 0xffffffffu >> (kLanes - threads);
    w.pc = 0;
    w.wait = Wait::none;
    w.others.clear();
    for (const Special& s : program.specials)
      for (int lane = 0; lane < kLanes; ++lane)
        w.at<uint32_t>(s.slot)[lane] = special_value(s.name, w, lane, *launch);
  }
}

void Machine::run_cta() {
  const uint64_t turns = launch->turn == 0 ? launch->limit : launch->turn;
  uint64_t used = 0;
  for (bool alive = true; alive;) {
    alive = false;
    bool progress = false;
    for (const int index : launch->warps) {
      Warp& w = cta_.warps[index];
      if (w.live == 0) continue;
      alive = true;
      settle(&w);
      if (w.lanes == 0) continue;
      used += run_warp(&w, turns);
      progress = true;
      if (used > launch->limit) report_hang("still runs after the limit of instructions");
    }
    if (alive && !progress) report_hang("hangs");
  }
}

// Chooses the group that runs: of those that can, the one at the smallest address.
void Machine::settle(Warp* warp) {
  Warp& w = *warp;
  if (w.lanes != 0) w.others.push_back({w.pc, w.lanes, w.wait, w.barrier});
  w.lanes = 0;
  w.wait = Wait::none;
  w.regroup = false;
  int first = INT_MAX;
  for (const Group& g : w.others)
    if (g.wait == Wait::none) first = std::min(first, g.pc);
  if (first == INT_MAX) return;
  w.pc = first;
  // Those that wait there for these lanes go on with them.
  for (size_t i = 0; i < w.others.size();) {
    if (w.others[i].pc == first && w.others[i].wait != Wait::barrier) {
      w.lanes |= w.others[i].lanes;
      w.others[i] = w.others.back();
      w.others.pop_back();
    } else {
      ++i;
    }
  }
}

uint64_t Machine::run_warp(Warp* warp, uint64_t turns) {
  Warp& w = *warp;
  const Instruction* code = program.code.data();
  uint64_t used = 0;
  try {
    while (w.lanes != 0 && used < turns) {
      int meeting = INT_MAX;
      for (const Group& g : w.others)
        if (g.wait != Wait::barrier) meeting = std::min(meeting, g.pc);
      do {
        const Instruction& in = code[w.pc];
        const uint32_t lanes = in.guarded ? w.lanes & w.predicate(in.guard) : w.lanes;
        const int threads = __builtin_popcount(w.lanes);
        w.next = w.pc + 1;
        if (lanes != 0) in.run(w, in, lanes);
        // Lanes that wait for others execute the instruction again.
        if (w.wait != Wait::lanes) counts_.executed[w.pc] += static_cast<uint64_t>(threads);
        w.pc = w.next;
        ++used;
      } while (!w.regroup && w.pc < meeting && used < turns);
      settle(&w);
    }
  } catch (const Error& error) {
    report(w, error.what());
  }
  return used;
}

void Machine::report(const Warp& w, const std::string& what) const {
  fail("ptx: ", what, " (", described(program.kernel.body[program.code[w.pc].index]), "; kernel ",
       program.kernel.name, ", block ", w.cta->index, ", warp ", w.index, ")");
}

void Machine::report_hang(const char* why) const {
  const Cta& cta = cta_;
  std::ostringstream text;
  int waiting = 0;
  for (const Warp& w : cta.warps) waiting += __builtin_popcount(w.live);
  text << "ptx: a block " << why << ": " << waiting << " of " << cta.threads << " threads of block "
       << cta.index << " wait (kernel " << program.kernel.name << ")";
  for (const Warp& w : cta.warps) {
    std::vector<Group> groups = w.others;
    if (w.lanes != 0) groups.push_back({w.pc, w.lanes, w.wait, w.barrier});
    for (const Group& g : groups)
      text << "\n  warp " << w.index << ": " << __builtin_popcount(g.lanes)
           << (g.wait == Wait::none ? " lanes run at " : " lanes wait at ")
           << described(program.kernel.body[program.code[g.pc].index]);
  }
  fail(text.str());
}

void arrive(Warp* warp, uint32_t lanes, int id, int expected, uint32_t vote) {
  Warp& w = *warp;
  if (lanes != w.lanes) fail("some lanes of the warp skip a barrier");
  if (id < 0 || id > 15) fail("there is no barrier ", id);
  Cta& cta = *w.cta;
  Barrier& b = cta.barriers[id];
  if (b.arrived > 0 && b.expected != expected)
    fail("barrier ", id, " expects ", b.expected, " threads and then ", expected);
  b.expected = expected;
  b.arrived += __builtin_popcount(lanes);
  b.voted |= vote & lanes;
  w.next = w.pc;  // it goes on when the barrier is complete
  w.wait = Wait::barrier;
  w.barrier = id;
  w.regroup = true;
  if (b.arrived < b.expected) return;
  if (b.arrived > b.expected) fail("barrier ", id, " expects ", b.expected, " threads, got more");
  const bool any = b.voted != 0;
  b = {};
  if (expected == cta.threads) cta.shared.barrier();
  const auto release = [&](Warp& other, Group& g) {
    const Instruction& in = w.machine->program.code[g.pc];
    if (in.run != w.machine->program.code[w.pc].run) fail("two kinds of barrier meet");
    if (in.votes) other.set_predicate(in.to, g.lanes, any ? ~0u : 0u);
    ++g.pc;
    g.wait = Wait::none;
  };
  for (Warp& other : cta.warps)
    for (Group& g : other.others)
      if (g.wait == Wait::barrier && g.barrier == id) release(other, g);
  Group self{w.pc, w.lanes, w.wait, w.barrier};
  release(w, self);
  w.next = self.pc;
  w.wait = Wait::none;
}

}  // namespace quaver::ptx
