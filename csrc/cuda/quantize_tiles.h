// What quantize.cu leaves to quantize_tiles.cu, whose arguments are checked.
#pragma once

#include "quaver/quantize.h"

namespace quaver::cuda {

void quantize_tiles(const TensorView& q, const TensorView& scale, const TensorView& amax,
                    const TensorView& x, const QuantizeOptions& options, bool given, void* stream);

}  // namespace quaver::cuda
