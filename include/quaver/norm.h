// The order of the gradient norm's f64 sum, which depends on shapes only and is the same on every
// device. A gradient is cut into pieces. In a piece element i goes to lane i % kNormLanes; each 16
// neighbouring lanes are added in order, and the 32 results in a tree. Piece p, scaled, goes to
// strand p % kNormStrands, and the strands are added in a tree. (A tree adds its upper half to its
// lower one until one is left.)
#pragma once

#include <cstdint>

namespace quaver {

constexpr int64_t kNormPiece = 1 << 14;
constexpr int kNormLanes = 512;
constexpr int kNormStrands = 256;

}  // namespace quaver
