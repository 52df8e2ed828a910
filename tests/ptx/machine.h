// Executes a decoded kernel. The lanes of a warp run in lockstep, as one vector; where they
// diverge, those at the smallest address go first, and lanes that reach the same instruction go on
// together. A warp runs as far ahead of the others as it can: what only luck protects then breaks.
// Clusters of CTAs, some at a time, take turns with the asynchronous copies that they started.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "asynchronous.h"
#include "memory.h"
#include "program.h"
#include "shared_memory.h"
#include "traffic.h"

namespace quaver::ptx {

class Machine;
struct Cluster;
struct Cta;
struct Instruction;
struct Warp;

// Where an operand's 32 values are: in the warp's registers or among the kernel's constants. A
// predicate is one word with a bit for each lane.
struct Slot {
  uint32_t offset = 0;
  uint8_t bank = 0, size = 0;
  bool negated = false;
};

using Handler = void (*)(Warp&, const Instruction&, uint32_t lanes);

struct Instruction {
  Handler run = nullptr;
  Slot to, also, a, b, c, guard;
  bool guarded = false;
  bool votes = false;         // a barrier that has a result
  bool touches_sums = false;  // registers that are accumulators of some product
  Space space = Space::generic;
  uint8_t bytes = 0;         // of one value in memory
  bool sign = false;         // values are extended by their sign
  int target = -1;           // of a branch
  int64_t displacement = 0;  // of an address
  std::vector<Slot> more;    // of a vector, or what the other slots do not hold
  int index = 0;             // of its statement
};

struct Special {
  std::string name;
  Slot slot;
};

// A kernel that is ready to run.
struct Program {
  Kernel kernel;
  std::vector<Instruction> code;
  uint64_t register_bytes = 0;
  std::vector<uint64_t> constants;
  std::vector<Special> specials;
  bool asynchronous = false;  // copies, products or mbarriers order its shared memory too
};

// Lanes wait at a barrier, or for others of their warp; lanes that poll let all others go first.
enum class Wait : uint8_t { none, barrier, lanes, poll };

// Lanes of a warp that are at one instruction.
struct Group {
  int pc;
  uint32_t lanes;
  Wait wait;
  int barrier;  // that it waits for
};

struct Warp {
  Cta* cta = nullptr;
  Machine* machine = nullptr;
  int index = 0;
  uint32_t live = 0;
  // The group that runs, and the others.
  int pc = 0, next = 0;
  uint32_t lanes = 0;
  bool regroup = false;  // the group that runs has split, ended or waits
  Wait wait = Wait::none;
  int barrier = 0;
  std::vector<Group> others;
  ProductQueue products;
  bool unfenced = true;  // accumulators were touched since wgmma.fence
  uint32_t phase = 0;    // of the cluster's barrier, when it arrived there
  std::vector<uint64_t> storage;
  unsigned char* banks[2] = {};

  template <class T> T* at(const Slot& s) const {
    return reinterpret_cast<T*>(banks[s.bank] + s.offset);
  }
  uint32_t predicate(const Slot& s) const {
    const uint32_t bits = *at<uint32_t>(s);
    return s.negated ? ~bits : bits;
  }
  void set_predicate(const Slot& s, uint32_t lanes_, uint32_t bits) {
    uint32_t& p = *at<uint32_t>(s);
    p = (p & ~lanes_) | (bits & lanes_);
  }
  int thread(int lane) const { return index * kLanes + lane; }
};

struct Barrier {
  int arrived = 0, expected = 0;
  uint32_t voted = 0;
};

struct Cta {
  Cluster* cluster = nullptr;
  uint32_t rank = 0;  // in its cluster
  Dim at;             // in the grid
  int64_t index = 0;
  int threads = 0;
  std::vector<Warp> warps;
  SharedMemory shared;
  std::vector<unsigned char> local;  // of all threads, one after the other
  Barrier barriers[16];
  std::map<uint32_t, Mbarrier> mbarriers;  // by address
  std::map<int, StoreQueue> stores;        // by thread
  std::map<int, CopyQueue> copies;         // by thread
  bool live() const;
};

// CTAs that run at the same time and reach each other's shared memory.
struct Cluster {
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<Load> loads;  // that have not landed
  std::vector<CopyGroup> groups;
  int arrived = 0;  // threads at the barrier of the cluster
  uint32_t phase = 0;
  uint64_t used = 0;  // instructions of its warps
  bool live() const;
};

struct Launch {
  Dim grid, cluster;
  int threads = 1;
  uint64_t dynamic_shared = 0;
  std::vector<int64_t> chosen;  // clusters that run, in their order
  int resident = 1;             // clusters at a time
  std::vector<unsigned char> parameters;
  std::vector<int> warps;       // their order
  uint64_t turn = 0;            // instructions before another warp gets its turn; 0: any number
  uint64_t limit = 50'000'000;  // instructions of the warps of a cluster together
  Timing timing;
};

// What the launches of a machine did.
struct Counts {
  std::vector<uint64_t> executed;  // by threads
  uint64_t instructions = 0;
};

// Runs one kernel, as often as it is launched.
class Machine {
 public:
  Machine(const Program& program, const Memory& memory);
  void run(const Launch& launch);
  const Counts& counts() const { return counts_; }
  const std::vector<std::unique_ptr<Cluster>>& clusters() const { return clusters_; }

  const Program& program;
  const Memory& memory;
  const Launch* launch = nullptr;
  Traffic* traffic = nullptr;  // where requests are counted, if at all
  std::vector<Range> ranges;   // of global memory, by instruction: the one that it touched last

 private:
  void prepare();
  void prepare(Cta* cta);
  void start(Cluster* cluster, int64_t index);
  void start(Cta* cta);
  bool refill(size_t* next);
  bool round(bool late);
  bool turn(Cluster* cluster, Warp* warp);
  uint64_t run_warp(Warp* warp, uint64_t turns);
  void settle(Warp* warp);
  [[noreturn]] void report(const Warp& warp, const std::string& what) const;
  [[noreturn]] void report_hang(const char* why) const;

  // These keep the memory of their registers from launch to launch.
  std::vector<std::unique_ptr<Cluster>> clusters_;
  Counts counts_;
};

// Calls f(lane) for each of `lanes`.
template <class F>
inline void for_lanes(uint32_t lanes, F f) {
  if (lanes == 0xffffffffu) {
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (; lanes != 0; lanes &= lanes - 1) f(__builtin_ctz(lanes));
  }
}

// The lanes of a warp that runs wait at a barrier of the CTA. `vote` is what bar.red combines.
void arrive(Warp* warp, uint32_t lanes, int barrier, int expected, uint32_t vote);

// These lanes go on at `next` when all others had their turn.
void poll(Warp* warp, int next);

// The value of a register that an instruction takes once for the warp.
uint32_t uniform(const Warp& w, const Slot& s, uint32_t lanes);
uint64_t uniform64(const Warp& w, const Slot& s, uint32_t lanes);
// Instructions that are .aligned need the whole warp.
void check_aligned(const Warp& w, uint32_t lanes);

}  // namespace quaver::ptx
