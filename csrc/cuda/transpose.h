// Transposes FP8 codes of many matrices in one launch, which a flag on the device can skip.
#pragma once

#include "transpose_tile.h"

namespace quaver::cuda {

struct TransposeEntry {
  const uint8_t* from;
  uint8_t* to;
  int64_t first;  // tile, of all
  Tiles tiles;
  bool aligned, aligned_t;
};

// `table` is on the device, of `count` entries with `tiles` tiles. Does nothing where *skip is not
// zero.
void transpose_codes(const char* op, const TransposeEntry* table, int64_t count, int64_t tiles,
                     const int* skip, void* stream);

}  // namespace quaver::cuda
