#include "tensor_list.h"
#include "transpose.h"

namespace quaver::cuda {
namespace {

__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const TransposeEntry* table, int64_t count, const int* skip) {
  __shared__ Tile tile;
  if (*skip) return;
  const TransposeEntry& e = table[owner_of(table, count, blockIdx.x)];
  const int64_t chunk = blockIdx.x - e.first;
  const int64_t row0 = chunk / e.tiles.across * kTile, col0 = chunk % e.tiles.across * kTile;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const TilePlace at = place_in_pass(pass, threadIdx.x);
    const int64_t row = row0 + at.row, col = col0 + first_column<kVector>(at);
    const int64_t n = row < e.tiles.rows ? e.tiles.cols - col : 0;
    put_codes<kVector>(tile, at, load<1>(e.from + row * e.tiles.cols + col, 1, n, e.aligned));
  }
  __syncthreads();
  store_transposed(e.to, tile, e.tiles, row0, col0, threadIdx.x, e.aligned_t);
}

}  // namespace

void transpose_codes(const char* op, const TransposeEntry* table, int64_t count, int64_t tiles,
                     const int* skip, void* stream) {
  if (tiles > 0) launch(op, transpose_kernel, tiles, kThreads, stream, table, count, skip);
}

}  // namespace quaver::cuda
