// Choices of matrix-product kernels that were measured on a GPU. They come before the model's
// (gemm_choice.h), for the products that they name alone.
#pragma once

#include <string>
#include <vector>

#include "quaver/gemm_choice.h"

namespace quaver {

struct MeasuredGemm {
  GemmProblem problem;
  std::string tactic;
};

// Replaces the table of this process. Throws Error, and keeps the old one, where a tactic is
// unknown or does not serve its problem, and where a problem comes twice.
void set_gemm_table(const std::vector<MeasuredGemm>& table);

// The tactic's index in gemm_tactics(), or -1 for a problem that was not measured.
int measured_tactic(const GemmProblem& problem);

// Changes with the table.
int64_t gemm_table_version();

}  // namespace quaver
