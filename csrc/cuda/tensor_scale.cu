#include "dispatch.h"
#include "quaver/cast.h"
#include "tensor_scale.h"
#include "transpose_tile.h"

namespace quaver::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) amax_kernel(TensorScale s) {
  const uint32_t seen = largest_partial(s);
  if (threadIdx.x == 0) *s.amax = bit_cast<float>(seen);
}

// Blocks of a pass that mostly has nothing to do.
int64_t idle_blocks(const char* op, int64_t tiles) {
  return std::min(tiles, 2 * multiprocessors(op));
}

}  // namespace

CastBlocks cast_blocks(const char* op, ScaleMode mode, int64_t tiles) {
  tiles = std::max<int64_t>(1, tiles);
  if (mode == ScaleMode::delayed) return {tiles, idle_blocks(op, tiles)};
  return {std::min(tiles, most_loop_blocks(op)), tiles};
}

void write_amax(const char* op, const TensorScale& s, void* stream) {
  if (s.mode == ScaleMode::given && s.amax != nullptr)
    launch(op, amax_kernel, 1, kThreads, stream, s);
}

int64_t cast_workspace_bytes(int64_t rows, int64_t cols) {
  const char* op = "cast";
  const int64_t tiles = tile_count(make_tiles(gemm_padded(rows), gemm_padded(cols)));
  const int64_t turns = std::min(ceil_div(rows, kThreads / kWarp), most_loop_blocks(op));
  const int64_t most = std::max({int64_t(1), tiles, turns, loop_blocks(op, rows * cols)});
  return kPartialsAt + most * int64_t(sizeof(uint32_t));
}

}  // namespace quaver::cuda
