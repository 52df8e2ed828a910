// gemm: from a tactic's index to its kernel, Hopper's (gemm_sm90.h) or one of mma.sync
// (gemm_mma.cu).
#include <utility>

#include "../arguments.h"
#include "../gemm_tactics.h"
#include "launch.h"
#include "quaver/gemm_choice.h"

namespace quaver::cuda {
#if defined(QUAVER_HAVE_HOPPER)
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
#endif

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
  const int others = tactic - hopper_tactics();
  if (others >= 0) return gemm_mma(arguments, others, launch);
  check_gemm_cuda(arguments);
  if (arguments.amax != nullptr) clear("gemm", arguments.amax, sizeof(float), launch.stream);
#if defined(QUAVER_HAVE_HOPPER)
  gemm_sm90::kRun[tactic](arguments, launch);
#else
  fail("gemm: this build has no products for Hopper; build with QUAVER_CUDA_ARCHS=90a");
#endif
}

}  // namespace quaver::cuda
