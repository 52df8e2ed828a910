// MicroAdam (Modoranu et al., arXiv 2405.15593, algorithm 1): Adam over the largest elements of the
// last gradients, kept sparse, with the rest of each gradient fed back in 4 bits.
//
//     a = g + (1 - alpha) * error
//     ring[t % window] = the `kept` largest |a| of each block of 4096 flat elements
//     error = 4-bit codes of what is left of a
//     w = decay * w - lr * (c1 * z1 / (sqrt(c2 * z2) + eps) + alpha * error)
//
// z1 and z2 are the sums of beta1^age * value and beta2^age * value^2 over the rows of the ring,
// and c_i = (1 - beta_i) / (1 - beta_i^t). What rounding a kept value to bf16 takes off stays in
// the rest, so that kept + rest = a exactly; the paper drops it.
#pragma once

#include <cmath>

#include "quaver/adam.h"
#include "quaver/codec.h"
#include "quaver/dither.h"
#include "quaver/tensor_view.h"

namespace quaver {

constexpr int64_t kTopBlock = 4096;  // flat elements among which the largest are kept
constexpr int64_t kErrorUnit = 16;   // an error block is a multiple of it
constexpr int64_t kMicroHyper = 6;   // lr, beta1, beta2, eps, weight_decay, alpha

// The largest magnitude of a: its squares overflow, as AdamW's do, but sums of the values do not.
constexpr float kMostFeedback = 1.26765060e30f;  // 2^100

// Orders values by magnitude, every NaN the same and above all: the payload of one that an
// instruction leaves depends on the compiler.
QUAVER_HD uint32_t order_bits(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x) & 0x7fffffffu;
  return select(bits > 0x7f800000u, 0x7fc00000u, bits);
}

// The constants of one step of one tensor, computed once in f64.
struct MicroAdamStep {
  double beta1, beta2;
  int64_t window, slot, rows;  // of the ring; the slot that this step writes, and rows in use
  float decay;                 // 1 - lr * weight_decay
  float step_size;             // lr * c1
  float root_c2;               // sqrt(c2)
  float eps;
  float feedback;  // lr * alpha
  float carried;   // 1 - alpha
};

QUAVER_HD MicroAdamStep micro_adam_step(const double* hyper, int64_t window, int64_t t) {
  const double lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2];
  MicroAdamStep s;
  s.beta1 = beta1;
  s.beta2 = beta2;
  s.window = window;
  s.slot = (t - 1) % window;
  s.rows = t < window ? t : window;
  s.decay = static_cast<float>(1.0 - lr * hyper[4]);
  s.step_size = static_cast<float>(lr * ((1.0 - beta1) / (1.0 - integer_power(beta1, t))));
  s.root_c2 = static_cast<float>(::sqrt((1.0 - beta2) / (1.0 - integer_power(beta2, t))));
  s.eps = static_cast<float>(hyper[3]);
  s.feedback = static_cast<float>(lr * hyper[5]);
  s.carried = static_cast<float>(1.0 - hyper[5]);
  return s;
}

// The factors of a row's values and of their squares.
struct RowWeight {
  float first, second;
};

QUAVER_HD RowWeight row_weight(const MicroAdamStep& s, int64_t row) {
  const int64_t age = row <= s.slot ? s.slot - row : s.slot - row + s.window;
  return {static_cast<float>(integer_power(s.beta1, age)),
          static_cast<float>(integer_power(s.beta2, age))};
}

// The sums over the rows, and the step that they make of an element; 0 of one that no row has.
struct SparseMoments {
  float first, second;
};

QUAVER_HD SparseMoments add_value(SparseMoments z, const RowWeight& row, float value) {
  z.first += row.first * value;
  z.second += row.second * (value * value);
  return z;
}

QUAVER_HD float sparse_update(const MicroAdamStep& s, SparseMoments z) {
  const float denominator = ::sqrtf(z.second) * s.root_c2 + s.eps;
  return denominator == 0.0f ? 0.0f : s.step_size * (z.first / denominator);
}

QUAVER_HD float micro_adam_weight(const MicroAdamStep& s, float weight, float update, float error) {
  return s.decay * weight - (update + s.feedback * error);
}

// The gradient with what is left of those before.
QUAVER_HD float with_feedback(const MicroAdamStep& s, float grad, float error) {
  return clamp(grad + s.carried * error, -kMostFeedback, kMostFeedback);
}

// The 4-bit codes of a block of errors: 16 levels from low to high, both bf16 and rounded outwards,
// so that no value lies outside and none is further than half a level from its code.
struct ErrorCodec {
  float low, level;
};

QUAVER_HD ErrorCodec error_codec(bf16 low, bf16 high) {
  return {decode(low), (decode(high) - decode(low)) / 15.0f};
}

QUAVER_HD float decode_error(const ErrorCodec& c, uint32_t code) {
  return c.low + c.level * static_cast<float>(static_cast<int32_t>(code));
}

// The comparisons are false for NaN, which a damaged state may have.
QUAVER_HD uint32_t encode_error(const ErrorCodec& c, float x) {
  const uint32_t divisor =
      select(c.level > 0.0f, bit_cast<uint32_t>(c.level), bit_cast<uint32_t>(1.0f));
  const float ratio = (x - c.low) / bit_cast<float>(divisor) + 0.5f;
  const uint32_t positive = select(ratio > 0.0f, bit_cast<uint32_t>(ratio), 0u);
  const float most = bit_cast<float>(positive);
  const uint32_t limited = select(most < 15.0f, positive, bit_cast<uint32_t>(15.0f));
  return static_cast<uint32_t>(static_cast<int32_t>(bit_cast<float>(limited)));
}

// Integers in the order of floats, -0 below 0, and every NaN the same, above all.
QUAVER_HD int32_t order_of(float x) {
  const auto bits = static_cast<int32_t>(select((bit_cast<uint32_t>(x) & 0x7fffffffu) > 0x7f800000u,
                                                0x7fc00000u, bit_cast<uint32_t>(x)));
  return bits ^ (bits >> 31 & 0x7fffffff);
}
QUAVER_HD float at_order(int32_t order) {
  return bit_cast<float>(order ^ (order >> 31 & 0x7fffffff));
}
constexpr int32_t kLeastOrder = INT32_MIN, kMostOrder = INT32_MAX;

// The bf16 next to x that is not above it, and not below it.
QUAVER_HD bf16 bf16_below(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bool away = (bits >> 31 != 0) & ((bits & 0xffffu) != 0);
  return bf16{static_cast<uint16_t>((bits >> 16) + select(away, 1u, 0u))};
}
QUAVER_HD bf16 bf16_above(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bool away = (bits >> 31 == 0) & ((bits & 0xffffu) != 0);
  return bf16{static_cast<uint16_t>((bits >> 16) + select(away, 1u, 0u))};
}

// The ends of an error range whose values have orders from `low` to `high`; both are NaN where a
// value is.
QUAVER_HD bf16 range_low(int32_t low, int32_t high) {
  constexpr int32_t infinity = 0x7f800000;
  return bf16_below(at_order(high > infinity ? high : low));
}
QUAVER_HD bf16 range_high(int32_t high) { return bf16_above(at_order(high)); }

// The blocks of a tensor of `numel` elements.
constexpr int64_t top_block_count(int64_t numel) { return (numel + kTopBlock - 1) / kTopBlock; }
constexpr int64_t error_block_count(int64_t numel, int64_t block) {
  return numel / block + (numel % block != 0);
}

struct MicroAdamParameter {
  TensorView weight, grad;
  const float* grad_scale = nullptr;  // null: 1
  const float* grad_amax = nullptr;   // of the decoded gradient; non-finite skips the whole step
  int16_t* index = nullptr;           // [window, row]: places inside of a block, ascending
  bf16* value = nullptr;              // [window, row]
  int64_t window = 0, row = 0;
  int64_t kept = 0;          // values of a row that belong to a whole block
  uint8_t* error = nullptr;  // two codes a byte, the even element's in the low bits
  bf16* range = nullptr;     // low and high of each error block
  int64_t error_block = 64;
  Remainder remainder;      // the low bits of a bf16 weight's f32 master (codec.h)
  bool stochastic = false;  // round a 16-bit weight by noise of (seed, step, element)
  uint64_t seed = 0;
  int64_t* step = nullptr;        // counts the steps taken, 0 <= *step < 2^63 - 1
  const double* hyper = nullptr;  // kMicroHyper numbers
};

// The values that block `b` keeps: as many as the rest of the row in the last block.
QUAVER_HD int64_t kept_of(int64_t numel, int64_t row, int64_t kept, int64_t b) {
  return b < numel / kTopBlock ? kept : row - numel / kTopBlock * kept;
}

// Whether an error block lies inside of one top block. Others are encoded in a pass of their own.
constexpr bool is_inside(int64_t error_block) { return kTopBlock % error_block == 0; }

namespace cpu {

// If any grad_amax is not finite nothing changes but *skipped, which counts up.
void micro_adam(const MicroAdamParameter* parameters, int64_t count, int64_t* skipped);

}  // namespace cpu

namespace cuda {

// Device memory, 16-byte aligned, that one call needs while it runs.
int64_t micro_adam_workspace_bytes(const MicroAdamParameter* parameters, int64_t count);

// The CPU's step on the device; a captured graph stays right.
void micro_adam(const MicroAdamParameter* parameters, int64_t count, int64_t* skipped,
                void* workspace, void* stream);

}  // namespace cuda
}  // namespace quaver
