// How the runtime on the interpreter launches kernels.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "../asynchronous.h"

namespace quaver::ptx {

struct LaunchOptions {
  Timing timing;
  int resident = 0;                                // clusters at a time; 0: all
  uint64_t turn = 0;                               // instructions before another warp gets its turn
  std::function<void(std::vector<int>*)> shuffle;  // changes the order of warps
  int64_t clusters = 0;                            // result: of the last launch
};

extern LaunchOptions launch_options;

}  // namespace quaver::ptx
