// The 4-bit codes of a thread's 16 elements: two a byte, the even element's in the low bits.
#pragma once

#include "vector.h"

namespace quaver::cuda {

// The 16 codes of a thread, 4 bits each.
using Codes = uint2;

// Puts a code where there is none yet.
QUAVER_DEVICE void put_code(Codes& c, int j, uint32_t code) {
  if (j < 8)
    c.x |= code << 4 * (j % 8);
  else
    c.y |= code << 4 * (j % 8);
}

QUAVER_DEVICE uint32_t code_at(const Codes& c, int j) {
  return (j < 8 ? c.x >> 4 * (j % 8) : c.y >> 4 * (j % 8)) & 15u;
}

QUAVER_DEVICE Codes load_codes(const uint8_t* codes, int64_t i, int64_t n, bool aligned) {
  if (aligned && n >= kVector) return *reinterpret_cast<const uint2*>(codes + i / 2);
  Codes c = {0, 0};
#pragma unroll
  for (int b = 0; b < kVector / 2; ++b) {
    if (2 * b >= n) continue;
    const uint32_t byte = uint32_t(codes[i / 2 + b]) << b % 4 * 8;
    if (b < 4)
      c.x |= byte;
    else
      c.y |= byte;
  }
  return c;
}

QUAVER_DEVICE void store_codes(uint8_t* codes, int64_t i, const Codes& c, int64_t n, bool aligned) {
  if (aligned && n >= kVector) {
    *reinterpret_cast<uint2*>(codes + i / 2) = c;
    return;
  }
#pragma unroll
  for (int b = 0; b < kVector / 2; ++b)
    if (2 * b < n) codes[i / 2 + b] = static_cast<uint8_t>((b < 4 ? c.x : c.y) >> b % 4 * 8);
}

}  // namespace quaver::cuda
