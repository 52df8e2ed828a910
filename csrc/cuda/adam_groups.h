// The path of COAT's moments (e4m3, expanded in groups of 128) where 16 elements of a thread are
// numbers before and after the step. Eight threads have a group, of which each computes the scalars
// once: fours of a thread lie 32 elements apart, so that each access of a warp fills its sectors.
// Its bits are those of adam.cu's general code, which has 32 threads for a group.
#pragma once

#include "adam_element.h"

namespace quaver::cuda {

constexpr int kMembers = int(kGroup) / kVector;  // threads of a group
constexpr int kFoursApart = kMembers * kQuad;
constexpr int kWarpSpan = kWarp * kVector;  // elements of a warp

// log2_of_code of e4m3, a copy for each lane of a warp: look-ups of any codes touch every bank of
// shared memory once.
struct LaneLogarithms {
  float of[128][kWarp];
};

// Fills the copies; all threads of the block call it, and synchronise before the first use.
QUAVER_DEVICE void fill(LaneLogarithms& to, const Logarithms& from, int thread) {
#pragma unroll 4
  for (int code = thread / kWarp; code < 128; code += kThreads / kWarp)
    to.of[code][thread % kWarp] = from.of[0][code];
}

// Of a thread's elements of one moment, without NaN: the bits of the largest magnitude, and of the
// smallest that is not zero, minus 1.
QUAVER_DEVICE void widen(GroupRange& range, uint32_t magnitude) {
  range.most = max_bits(range.most, magnitude);
  range.least = min_bits(range.least, magnitude - 1u);
}

// What a group's moments are encoded by.
struct GroupCode {
  float scale;
  Expander expander;
};

// The constants of both moments' groups, from the ranges of each thread's elements. Half of a
// group's threads compute the first moment's and the others the second's, and hand them over.
QUAVER_DEVICE void agree(const GroupRange& first, const GroupRange& second,
                         GroupCode (&code)[kStates]) {
  constexpr int kHalf = kMembers / 2;
  const bool upper = (threadIdx.x & kHalf) != 0;
  GroupRange range = {upper ? second.most : first.most, upper ? second.least : first.least};
  const GroupRange other = {upper ? first.most : second.most, upper ? first.least : second.least};
  range.most = max_bits(range.most, __shfl_xor_sync(kAllLanes, other.most, kHalf));
  range.least = min_bits(range.least, __shfl_xor_sync(kAllLanes, other.least, kHalf));
#pragma unroll
  for (int d = 1; d < kHalf; d *= 2) {
    range.most = max_bits(range.most, __shfl_xor_sync(kAllLanes, range.most, d));
    range.least = min_bits(range.least, __shfl_xor_sync(kAllLanes, range.least, d));
  }
  const float scale = expanded_scale<e4m3>(range), offset = expander<e4m3>(scale).offset;
  const float other_scale = __shfl_xor_sync(kAllLanes, scale, kHalf);
  const float other_offset = __shfl_xor_sync(kAllLanes, offset, kHalf);
#pragma unroll
  for (int k = 1; k < kStates; ++k) {
    const bool mine = upper == (k == 2);
    GroupCode& c = code[k];
    c.scale = mine ? scale : other_scale;
    c.expander = {group_lift(c.scale), power_of(c.scale), mine ? offset : other_offset};
  }
}

// The values of four codes that are numbers, and without signs unless kSigned. `logarithms` are the
// lane's.
template <bool kSigned>
QUAVER_DEVICE void decode_numbers(uint32_t word, float scale, float inverse_power,
                                  const float* logarithms, float (&x)[kQuad]) {
  static_assert(sizeof(LaneLogarithms::of[0]) == 128, "a code's offset is itself, shifted by 7");
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const uint32_t offset = (j == 0 ? word << 7 : word >> (8 * j - 7)) & 0x3f80u;
    const float log2 =
        *reinterpret_cast<const float*>(reinterpret_cast<const char*>(logarithms) + offset);
    const uint32_t a = bit_cast<uint32_t>(contract_number(offset, log2, inverse_power));
    x[j] = bit_cast<float>(kSigned ? a | (word << (24 - 8 * j) & 0x80000000u) : a) * scale;
  }
}

// Bits that are set where a code of four is NaN.
QUAVER_DEVICE uint32_t nan_codes(uint32_t word) {
  return ((word & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
}

// A thread's part of a group: codes of the moments and gradients, and their values after the step.
struct Sixteen {
  AnyQuad exp_avg_code[kQuads], exp_avg_sq_code[kQuads];
  float exp_avg[kVector], exp_avg_sq[kVector], grad[kVector];
};

QUAVER_DEVICE AnyQuad load_whole(const void* from, DType type, int64_t i) {
  return load_quad(from, type, i, kQuad, true, true);
}

QUAVER_DEVICE void store_whole(void* to, DType type, int64_t i, const AnyQuad& v) {
  store_quad(to, type, i, v, kQuad, true, true);
}

template <DType kType>
QUAVER_DEVICE void load_grad(const Entry& e, const Plan& p, int64_t i, float (&grad)[kVector]) {
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    float four[kQuad];
    decode_any(kType, load_whole(e.grad, kType, i + q * kFoursApart), 0, p.grad_scale, four);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) grad[q * kQuad + j] = four[j];
  }
}

QUAVER_DEVICE void load_sixteen(const Entry& e, const Plan& p, int64_t i, Sixteen& t) {
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    t.exp_avg_code[q] = load_whole(e.state[1].values, DType::e4m3, i + q * kFoursApart);
    t.exp_avg_sq_code[q] = load_whole(e.state[2].values, DType::e4m3, i + q * kFoursApart);
  }
  switch (e.grad_type) {  // once for all fours
    case DType::f32: load_grad<DType::f32>(e, p, i, t.grad); break;
    case DType::f16: load_grad<DType::f16>(e, p, i, t.grad); break;
    case DType::bf16: load_grad<DType::bf16>(e, p, i, t.grad); break;
    case DType::e4m3: load_grad<DType::e4m3>(e, p, i, t.grad); break;
    case DType::e5m2: load_grad<DType::e5m2>(e, p, i, t.grad); break;
  }
}

// Steps a thread's moments in registers. Returns whether all that decides their codes are numbers.
QUAVER_DEVICE bool step_moments(const Plan& p, const float* logarithms,
                                const float (&scale)[kStates], Sixteen& t,
                                GroupRange (&range)[kStates]) {
  float inverse[kStates];
#pragma unroll
  for (int k = 1; k < kStates; ++k) inverse[k] = 1.0f / power_of(scale[k]);
  uint32_t odd = 0;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const uint32_t first = t.exp_avg_code[q].word[0], second = t.exp_avg_sq_code[q].word[0];
    float m[kQuad], v[kQuad];
    decode_numbers<true>(first, scale[1], inverse[1], logarithms, m);
    decode_numbers<false>(second, scale[2], inverse[2], logarithms, v);
    odd |= nan_codes(first) | nan_codes(second) | (second & 0x80808080u);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const int k = q * kQuad + j;
      t.exp_avg[k] = next_exp_avg(p.step, m[j], t.grad[k]);
      t.exp_avg_sq[k] = next_exp_avg_sq(p.step, v[j], t.grad[k]);
      widen(range[1], magnitude_bits(t.exp_avg[k]));
      widen(range[2], bit_cast<uint32_t>(t.exp_avg_sq[k]));  // a sign counts as no number
    }
  }
  return odd == 0 && max_bits(range[1].most, range[2].most) < 0x7f800000u;
}

// Steps and stores weights of which the moments are this step's.
template <DType kType>
QUAVER_DEVICE void step_weights(Entry e, const Plan& p, int64_t i, const Sixteen& t) {
  e.state[0].type = kType;
  if (kType != DType::bf16) e.remainder.bytes = 0;
  const AdamStep& step = p.step;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    Loaded l = {};
    l.i = i + q * kFoursApart;
    l.scale[0] = 1.0f;
    l.state[0] = load_whole(e.state[0].values, kType, l.i);
    if (e.remainder.bytes != 0)
      l.remainder = load_whole(e.remainder.data, remainder_type(e.remainder), l.i);
    float w[kQuad];
    decode_weight(e, l, w);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const int k = q * kQuad + j;
      w[j] = next_weight(step, {w[j], t.exp_avg[k], t.exp_avg_sq[k]});
    }
    uint32_t start[kQuad] = {};
    if (e.stochastic) dither_starts(p.dither, static_cast<uint64_t>(e.first_element + l.i), start);
    encode_weight(e, p, w, start, l);
    store_whole(e.state[0].values, kType, l.i, l.state[0]);
    if (e.remainder.bytes != 0)
      store_whole(e.remainder.data, remainder_type(e.remainder), l.i, l.remainder);
  }
}

QUAVER_DEVICE void step_weights(const Entry& e, const Plan& p, int64_t i, const Sixteen& t) {
  switch (e.state[0].type) {
    case DType::f32: return step_weights<DType::f32>(e, p, i, t);
    case DType::f16: return step_weights<DType::f16>(e, p, i, t);
    default: step_weights<DType::bf16>(e, p, i, t);
  }
}

// settle_exp_avg of adam.h for the magnitude a of a number, in e4m3 and without noise.
QUAVER_DEVICE uint32_t settle_magnitude(float a, bool weak) {
  const uint32_t bits = bit_cast<uint32_t>(a), small = bit_cast<uint32_t>(rounded_down(a));
  const uint32_t normal = weak ? bits & ~kDropped : bits;
  return a < kLeastNormal ? small : normal;
}

// Encodes the moments and stores them. All threads of a warp must call it.
QUAVER_DEVICE void store_moments(const Entry& e, int64_t i, const GroupRange (&range)[kStates],
                                 const Sixteen& t) {
  GroupCode code[kStates];
  agree(range[1], range[2], code);
  if (threadIdx.x % kMembers == 0) {
    e.state[1].scale[i / kGroup] = code[1].scale;
    e.state[2].scale[i / kGroup] = code[2].scale;
  }
  constexpr float least = 1.0f / (1 << (Format<e4m3>::bias - 1 + Format<e4m3>::mantissa));
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    float m[kQuad], v[kQuad];
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const float x = t.exp_avg[q * kQuad + j], square = t.exp_avg_sq[q * kQuad + j];
      const bool weak = 8.0f * ::fabsf(t.grad[q * kQuad + j]) < bit_cast<float>(magnitude_bits(x));
      const float y = expanded_number(log2_expanded(code[1].expander, x));
      m[j] = bit_cast<float>(settle_magnitude(y, weak) | (bit_cast<uint32_t>(x) & 0x80000000u));
      const float floor = square == 0.0f ? 0.0f : least;  // keep_nonzero of codec.h
      v[j] = at_least(expanded_number(log2_expanded(code[2].expander, square)), floor);
    }
    const AnyQuad codes = {{convert_finite_word<e4m3>(m)}};
    store_whole(e.state[1].values, DType::e4m3, i + q * kFoursApart, codes);
    const AnyQuad squares = {{convert_finite_word<e4m3>(v)}};
    store_whole(e.state[2].values, DType::e4m3, i + q * kFoursApart, squares);
  }
}

// Updates a warp's elements from `first` on, of which each thread has 16. Returns whether it could;
// else nothing has changed.
QUAVER_DEVICE bool update_groups(const Entry& e, const Plan& p, const LaneLogarithms& logarithms,
                                 int64_t first) {
  const int lane = threadIdx.x % kWarp;
  const int64_t i = first + lane / kMembers * kGroup + lane % kMembers * kQuad;
  float scale[kStates];
#pragma unroll
  for (int k = 1; k < kStates; ++k) scale[k] = e.state[k].scale[i / kGroup];
  Sixteen t;
  GroupRange range[kStates];
  load_sixteen(e, p, i, t);
  const bool known = step_moments(p, &logarithms.of[0][lane], scale, t, range);
  if (__reduce_max_sync(kAllLanes, known ? 0u : 1u) != 0) return false;
  step_weights(e, p, i, t);
  store_moments(e, i, range, t);
  return true;
}

}  // namespace quaver::cuda
