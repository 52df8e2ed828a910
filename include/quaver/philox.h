// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the random
// bits of an element depend on (seed, element index) only, never on threads or launch shape.
#pragma once

#include "quaver/dtype.h"

namespace quaver {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // what the key grows by

struct Philox4 {
  uint32_t word[4];
};

QUAVER_HD Philox4 philox4x32(uint64_t seed, uint64_t counter_low, uint64_t counter_high = 0) {
  uint32_t c0 = uint32_t(counter_low), c1 = uint32_t(counter_low >> 32);
  uint32_t c2 = uint32_t(counter_high), c3 = uint32_t(counter_high >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(kPhiloxM0) * c0;
    const uint64_t p1 = uint64_t(kPhiloxM1) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = n0;
    c2 = n2;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// The 32 random bits of one element: word (index % 4) of block (index / 4). `offset` counts the
// times that the element is drawn for.
QUAVER_HD uint32_t random_bits(uint64_t seed, uint64_t index, uint64_t offset = 0) {
  const Philox4 block = philox4x32(seed, index >> 2, offset);
  const uint32_t lane = uint32_t(index & 3u);
  return lane == 0   ? block.word[0]
         : lane == 1 ? block.word[1]
         : lane == 2 ? block.word[2]
                     : block.word[3];
}

}  // namespace quaver
