// NF4 (QLoRA, arXiv 2305.14314): 16 levels at the quantiles of a normal distribution, for weights
// that stay as they are. x ~= absmax * level, with one absmax for each block of flat elements.
#pragma once

#include "quaver/fp8.h"
#include "quaver/tensor_view.h"

namespace quaver {

constexpr int64_t kNf4Levels = 16;
constexpr uint32_t kNf4Zero = 7;        // the code of 0
constexpr int64_t kNf4MinBlock = 64;    // a block is a power of two from here
constexpr int64_t kNf4MaxBlock = 4096;  // to here

QUAVER_HD float nf4_level(uint32_t code) {
  constexpr float level[kNf4Levels] = {-1.0f,
                                       -0.6961928009986877f,
                                       -0.5250730514526367f,
                                       -0.39491748809814453f,
                                       -0.28444138169288635f,
                                       -0.18477343022823334f,
                                       -0.09105003625154495f,
                                       0.0f,
                                       0.07958029955625534f,
                                       0.16093020141124725f,
                                       0.24611230194568634f,
                                       0.33791524171829224f,
                                       0.44070982933044434f,
                                       0.5626170039176941f,
                                       0.7229568362236023f,
                                       1.0f};
  // By comparisons: a GPU would keep an array that a variable indexes in memory.
  float found = level[0];
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (uint32_t k = 1; k < kNf4Levels; ++k)
    found =
        bit_cast<float>(select(code == k, bit_cast<uint32_t>(level[k]), bit_cast<uint32_t>(found)));
  return found;
}

// The multiplier that takes a block to [-1, 1]. A block of zeros, or of values that have no finite
// reciprocal, takes the largest multiplier.
QUAVER_HD float nf4_inverse(float absmax) {
  constexpr float least = 1e-38f;
  return 1.0f / bit_cast<float>(
                    select(absmax < least, bit_cast<uint32_t>(least), bit_cast<uint32_t>(absmax)));
}

// The level nearest to y, the lower one of two as near: the number of midpoints below y. NaN, of
// which none is, takes code 0.
QUAVER_HD uint32_t nf4_code(float y) {
  constexpr float midpoint[kNf4Levels - 1] = {
      -0.8480963706970215f,  -0.6106328964233398f,  -0.4599952697753906f,   -0.33967941999435425f,
      -0.23460739850997925f, -0.13791173696517944f, -0.045525018125772476f, 0.03979014977812767f,
      0.120255246758461f,    0.2035212516784668f,   0.2920137643814087f,    0.3893125355243683f,
      0.5016634464263916f,   0.6427869200706482f,   0.8614784479141235f};
  uint32_t code = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int k = 0; k < kNf4Levels - 1; ++k) code += y > midpoint[k];
  return code;
}

// The bits of a block's largest magnitude, every NaN the same: the payload of one that an
// instruction leaves depends on the compiler.
QUAVER_HD float nf4_absmax(uint32_t magnitude_bits) {
  return bit_cast<float>(magnitude_bits > 0x7f800000u ? 0x7fc00000u : magnitude_bits);
}

constexpr int64_t nf4_block_count(int64_t numel, int64_t block) {
  return numel / block + (numel % block != 0);
}

// Two codes a byte, the even element's in the high bits; an odd tensor's last byte has the code of
// 0 in its low bits.
struct Nf4View {
  uint8_t* codes = nullptr;  // (numel + 1) / 2
  float* absmax = nullptr;   // of each block
  int64_t numel = 0;
  int64_t block = 64;
};

namespace cpu {

// x is f32, f16 or bf16. A block with a NaN has a NaN absmax, one with an infinity an infinite one.
void nf4_encode(const Nf4View& out, const TensorView& x);
void nf4_decode(const TensorView& out, const Nf4View& x);

}  // namespace cpu

namespace cuda {

// The CPU's bits on the device, in `stream`.
void nf4_encode(const Nf4View& out, const TensorView& x, void* stream);
void nf4_decode(const TensorView& out, const Nf4View& x, void* stream);

}  // namespace cuda
}  // namespace quaver
