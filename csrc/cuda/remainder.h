// The further bits of a bf16 weight's master in vectors of registers: 16 bits, or 8 of a 24-bit
// one.
#pragma once

#include "quaver/codec.h"
#include "runtime_type.h"

namespace quaver::cuda {

// A type of its size, by which it is loaded and stored.
QUAVER_DEVICE DType remainder_type(const Remainder& r) {
  return r.bytes == 2 ? DType::bf16 : DType::e4m3;
}

template <int kSize>
QUAVER_DEVICE uint32_t half_of(const Packed<kSize>& v, int j) {
  return v.word[j / 2] >> j % 2 * 16 & 0xffff;
}

template <int kSize>
QUAVER_DEVICE void put_half(Packed<kSize>& v, int j, uint32_t bits) {
  v.word[j / 2] = (v.word[j / 2] & ~(0xffffu << j % 2 * 16)) | bits << j % 2 * 16;
}

// Element j as join_master takes the 16 bits.
template <int kSize>
QUAVER_DEVICE uint16_t low_of(const Remainder& r, const Packed<kSize>& v, int j) {
  if (r.bytes == 2) return static_cast<uint16_t>(half_of(v, j));
  return static_cast<uint16_t>((v.word[j / 4] >> j % 4 * 8 & 0xff) << 8);
}

// Puts the low bits of a master into element j and returns its weight.
template <int kSize>
QUAVER_DEVICE bf16 put_low(const Remainder& r, float master, Packed<kSize>& v, int j) {
  if (r.bytes == 2) {
    const uint32_t bits = master_bits<uint16_t>(master);
    put_half(v, j, master_low<uint16_t>(bits));
    return master_high(bits);
  }
  const uint32_t bits = master_bits<uint8_t>(master);
  const uint32_t low = master_low<uint8_t>(bits);
  v.word[j / 4] = (v.word[j / 4] & ~(0xffu << j % 4 * 8)) | low << j % 4 * 8;
  return master_high(bits);
}

}  // namespace quaver::cuda
