// Whose turn it is: rounds over the warps of the clusters, and the groups of lanes within a warp.
#include <algorithm>
#include <climits>
#include <sstream>

#include "machine.h"
#include "quaver/check.h"

namespace quaver::ptx {

namespace {

constexpr uint64_t kPolling = 12;  // instructions of a turn that did nothing but look

std::string described(const Statement& s) {
  return "line " + std::to_string(s.line) + ": " + s.text;
}

}  // namespace

// Every warp has a turn; true if one did more than look at what it waits for. CTAs that are late
// have theirs in rounds of their own.
bool Machine::round(bool late) {
  bool progress = false;
  const auto run_cta = [&](Cluster* cluster, Cta* cta) {
    if ((static_cast<int>(cta->rank) == launch->timing.late_cta) != late) return;
    for (const int index : launch->warps) progress |= turn(cluster, &cta->warps[index]);
  };
  for (const auto& cluster : clusters_) {
    const size_t n = cluster->ctas.size();
    for (size_t i = 0; i < n; ++i)
      run_cta(cluster.get(), cluster->ctas[launch->timing.descending ? n - 1 - i : i].get());
  }
  return progress;
}

bool Machine::turn(Cluster* cluster, Warp* warp) {
  Warp& w = *warp;
  if (w.live == 0) return false;
  for (Group& g : w.others)
    if (g.wait == Wait::poll) g.wait = Wait::none;
  settle(&w);
  if (w.lanes == 0) return false;
  const uint64_t limit = launch->limit * cluster->ctas.size();
  const uint64_t used = run_warp(&w, launch->turn == 0 ? limit : launch->turn);
  cluster->used += used;
  if (cluster->used > limit) report_hang("still runs after the limit of instructions");
  const bool polls = std::any_of(w.others.begin(), w.others.end(),
                                 [](const Group& g) { return g.wait == Wait::poll; });
  return used > kPolling || !polls;
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
        if (in.touches_sums && lanes != 0) touch_accumulators(&w, in);
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
  constexpr int kShown = 40;
  std::ostringstream text;
  text << "ptx: a block " << why;
  int shown = 0;
  for (const auto& cluster : clusters_)
    for (const auto& cta : cluster->ctas) {
      int waiting = 0;
      for (const Warp& w : cta->warps) waiting += __builtin_popcount(w.live);
      if (waiting == 0) continue;
      text << (shown == 0 ? ": " : "\n") << waiting << " of " << cta->threads
           << " threads of block " << cta->index << " wait";
      if (shown == 0) text << " (kernel " << program.kernel.name << ")";
      for (const Warp& w : cta->warps) {
        std::vector<Group> groups = w.others;
        if (w.lanes != 0) groups.push_back({w.pc, w.lanes, w.wait, w.barrier});
        for (const Group& g : groups)
          if (++shown <= kShown)
            text << "\n  warp " << w.index << ": " << __builtin_popcount(g.lanes)
                 << (g.wait == Wait::none ? " lanes run at " : " lanes wait at ")
                 << described(program.kernel.body[program.code[g.pc].index]);
      }
    }
  fail(text.str());
}

void poll(Warp* warp, int next) {
  warp->next = next;
  warp->wait = Wait::poll;
  warp->regroup = true;
}

uint32_t uniform(const Warp& w, const Slot& s, uint32_t lanes) {
  const uint32_t* values = w.at<uint32_t>(s);
  const uint32_t first = values[__builtin_ctz(lanes)];
  for_lanes(lanes, [&](int i) {
    if (values[i] != first) fail("an operand differs between the lanes of a warp");
  });
  return first;
}

uint64_t uniform64(const Warp& w, const Slot& s, uint32_t lanes) {
  const uint64_t* values = w.at<uint64_t>(s);
  const uint64_t first = values[__builtin_ctz(lanes)];
  for_lanes(lanes, [&](int i) {
    if (values[i] != first) fail("an operand differs between the lanes of a warp");
  });
  return first;
}

void check_aligned(const Warp& w, uint32_t lanes) {
  if (lanes != w.live) fail("some lanes of the warp skip an instruction that is .aligned");
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
