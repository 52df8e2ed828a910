// Executes a decoded kernel. The lanes of a warp run in lockstep, as one vector; where they
// diverge, those at the smallest address go first, and lanes that reach the same instruction go on
// together. A warp runs as far ahead of the others as it can: what only luck protects then breaks.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "memory.h"
#include "program.h"
#include "shared_memory.h"
#include "traffic.h"

namespace quaver::ptx {

class Machine;
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
  bool votes = false;  // a barrier that has a result
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
};

enum class Wait : uint8_t { none, barrier, lanes };

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
  int64_t index = 0;
  int threads = 0;
  std::vector<Warp> warps;
  SharedMemory shared;
  std::vector<unsigned char> local;  // of all threads, one after the other
  Barrier barriers[16];
};

struct Launch {
  int64_t blocks = 1;
  int threads = 1;
  std::vector<int64_t> chosen;  // blocks that run, in their order
  std::vector<unsigned char> parameters;
  std::vector<int> warps;       // their order
  uint64_t turn = 0;            // instructions before another warp gets its turn; 0: any number
  uint64_t limit = 50'000'000;  // instructions of the warps of a CTA together
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

  const Program& program;
  const Memory& memory;
  const Launch* launch = nullptr;
  Traffic* traffic = nullptr;  // where requests are counted, if at all
  std::vector<Range> ranges;   // of global memory, by instruction: the one that it touched last

 private:
  void prepare();
  void start(int64_t block);
  void run_cta();
  uint64_t run_warp(Warp* warp, uint64_t turns);
  void settle(Warp* warp);
  [[noreturn]] void report(const Warp& warp, const std::string& what) const;
  [[noreturn]] void report_hang(const char* why) const;

  Cta cta_;  // its registers keep their memory from launch to launch
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

}  // namespace quaver::ptx
