// The noise by which an optimizer step rounds a weight and a first moment to few bits.
//
// It is uniform over elements, so that rounding is unbiased, and a sequence of low discrepancy over
// the steps of one element: multiples of the golden ratio from a start of its own (Weyl, "Über die
// Gleichverteilung von Zahlen mod. Eins", 1916). With independent noise the rounding errors of a
// weight add up as a random walk; with this they cancel for the most part, since successive updates
// resemble each other, and a weight stays about twice as near to one that is not rounded.
#pragma once

#include "quaver/dtype.h"

namespace quaver {

// The constants of one step of one parameter.
struct Dither {
  uint32_t key;              // of the parameter
  uint32_t weight, exp_avg;  // how far the two sequences have come
};

// A bijection of 32 bits in which every input bit changes every output bit with probability 1/2
// (the finalizer of Appleby's MurmurHash3).
QUAVER_HD uint32_t mix_bits(uint32_t x) {
  x = (x ^ x >> 16) * 0x85EBCA6Bu;
  x = (x ^ x >> 13) * 0xC2B2AE35u;
  return x ^ x >> 16;
}

// `step` counts from any number. The weight's multiplier is 2^32 over the golden ratio, and the
// moment's 2^32 over the square of the plastic ratio, with which pairs too are spread evenly.
QUAVER_HD Dither make_dither(uint64_t seed, uint64_t step) {
  Dither d;
  d.key = mix_bits(static_cast<uint32_t>(seed) + mix_bits(static_cast<uint32_t>(seed >> 32)));
  d.weight = static_cast<uint32_t>(step) * 0x9E3779B9u;
  d.exp_avg = static_cast<uint32_t>(step) * 0x91E10DA5u;
  return d;
}

// The start of an element's sequences, by its flat index in the whole tensor.
QUAVER_HD uint32_t dither_start(const Dither& d, uint32_t low, uint32_t high) {
  return mix_bits(low ^ d.key) + high * 0xC13FA9A9u;
}

// 32 bits of noise, of which the rounding takes the upper ones.
QUAVER_HD uint32_t weight_noise(const Dither& d, uint32_t start) { return start + d.weight; }
QUAVER_HD uint32_t exp_avg_noise(const Dither& d, uint32_t start) {
  return start * 0xC2B2AE35u + d.exp_avg;
}

}  // namespace quaver
