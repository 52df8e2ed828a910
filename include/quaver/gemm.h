// Stage "gemm": out = scale_a * scale_b * a @ b.T (+ bias, + out) of FP8 operands, TN, sums in f32.
#pragma once

#include "quaver/layout.h"

namespace quaver {

// Where a product's scales go. outer: those of tensors or rows multiply the finished sum. tiles and
// blocks multiply the partial sum of each 128 of K: a has a scale for each 1 x 128 block, and b for
// each 128 x 128 tile or for each 1 x 128 block.
enum class GemmScales : int8_t { outer, tiles, blocks };

struct GemmArguments {
  TensorView out;                  // [M, N] in bf16, f16 or f32; in FP8 with out_scale and amax
  TensorView a;                    // [M, K] codes
  TensorView b;                    // [N, K] codes
  const float* scale_a = nullptr;  // one, or M of them, or those of blocks
  const float* scale_b = nullptr;  // one, or N of them, or those of tiles or blocks
  GemmScales scales = GemmScales::outer;
  bool rows_a = false, rows_b = false;
  const float* bias = nullptr;       // [N], or none
  const float* out_scale = nullptr;  // FP8 out: the decode scale to encode with
  float* amax = nullptr;             // FP8 out: receives the amax of what was encoded
  bool accumulate = false;           // adds to out, which is bf16, f16 or f32
  bool fast_accumulate = true;       // permits the tensor core's own 14-bit sums
};

// Formats of one size share a kernel, which takes the format as an argument.
enum class GemmOut : int8_t { half, f32, fp8 };
// Two warpgroups of Hopper's share a tile, or take turns at one each; or the warps of a block share
// one by mma.sync, which every GPU from sm_89 on has.
enum class GemmSchedule : int8_t { cooperative, pingpong, warps };
// The units of work: whole tiles, or parts of them along K, reduced in a fixed order.
enum class GemmScheduler : int8_t { persistent, stream_k };

// How operands reach shared memory: boxes by Hopper's TMA or 16 bytes by cp.async, both of which
// want pointers, N and K in multiples of 16; or single bytes, which any address and width will do.
enum class GemmCopies : int8_t { tma, vectors, bytes };

constexpr int kGemmTileK = 128;
constexpr int kGemmAlignment = 16;  // of pointers and rows in bytes, hence of N and K
// Sizes are 32-bit in kernels, and so are CUTLASS's counts of tiles, rounded up to bands.
constexpr int64_t kGemmMaxSize = (int64_t(1) << 31) - (int64_t(1) << 16);

// How a launch walks the tiles.
struct GemmLaunch {
  int sm_count = 0;
  int swizzle = 1;      // clusters side by side in one band of the output, for the L2 cache; tiles
                        // in M of a band where warps share one
  bool along_m = true;  // neighbouring clusters are neighbours in M
  int splits = 1;       // stream_k: more than one cuts K into so many parts, one cuts work evenly
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
  void* stream = nullptr;
};

namespace cpu {

// Whether this machine's products are gemm's, which are faster there than torch's of decoded codes.
bool has_gemm();
// With scales as the layouts say, of blocks of kScaleTile, and a result in f32 or bf16.
void gemm(const GemmArguments& arguments, const Layout& layout_a, const Layout& layout_b);

}  // namespace cpu
namespace cuda {

struct GemmDevice {
  int sm_count, major, minor;  // multiprocessors and compute capability of the current device
};
GemmDevice gemm_device();

// The kernel of gemm_tactics()[tactic]. The workspace has the size that its candidate gives and may
// be dirty.
void gemm(const GemmArguments& arguments, int tactic, const GemmLaunch& launch);
// That of gemm_tactics()[hopper_tactics() + row].
void gemm_mma(const GemmArguments& arguments, int row, const GemmLaunch& launch);

}  // namespace cuda
}  // namespace quaver
