// gemm on Hopper: from a tactic's index to its kernel (gemm_sm90.h).
#include <utility>

#include "../arguments.h"
#include "../gemm_tactics.h"
#include "launch.h"

namespace quaver::cuda {
namespace gemm_sm90 {

#define QUAVER_ROW(NAME, ...) void run_##NAME(const GemmArguments&, const GemmLaunch&);
QUAVER_GEMM_TACTICS(QUAVER_ROW)
#undef QUAVER_ROW

constexpr void (*kRun[])(const GemmArguments&, const GemmLaunch&) = {
#define QUAVER_ROW(NAME, ...) run_##NAME,
    QUAVER_GEMM_TACTICS(QUAVER_ROW)
#undef QUAVER_ROW
};

}  // namespace gemm_sm90

GemmDevice gemm_device() {
  int device = 0;
  GemmDevice d = {};
  check_status("gemm", "no current CUDA device", cudaGetDevice(&device));
  for (const auto& [value, attribute] : {std::pair{&d.sm_count, cudaDevAttrMultiProcessorCount},
                                         std::pair{&d.major, cudaDevAttrComputeCapabilityMajor},
                                         std::pair{&d.minor, cudaDevAttrComputeCapabilityMinor}})
    check_status("gemm", "the CUDA device does not answer",
                 cudaDeviceGetAttribute(value, attribute, device));
  return d;
}

void gemm(const GemmArguments& arguments, int tactic, const GemmLaunch& launch) {
  check_gemm_cuda(arguments);
  if (arguments.amax != nullptr) clear("gemm", arguments.amax, sizeof(float), launch.stream);
  gemm_sm90::kRun[tactic](arguments, launch);
}

}  // namespace quaver::cuda
