// Tensor maps (CUtensorMap): a tensor of up to five axes in global memory, and the box that one
// instruction copies between it and shared memory.
#pragma once

#include <array>
#include <cstdint>

namespace quaver::ptx {

using Coordinates = std::array<int32_t, 5>;

// What our stand-in for cuTensorMapEncodeTiled writes into the 128 bytes of a map.
struct TensorMap {
  static constexpr uint32_t kMagic = 0x544d4150;
  uint32_t magic = kMagic;
  uint8_t rank = 0, element_bytes = 0;
  uint8_t swizzle = 0;  // 0 to 3: none, 32, 64 or 128 bytes
  uint64_t address = 0;
  uint64_t strides[4] = {};  // in bytes, of the axes after the first
  uint64_t sizes[5] = {1, 1, 1, 1, 1};
  uint16_t box[5] = {1, 1, 1, 1, 1};
  uint64_t box_bytes() const;
};
static_assert(sizeof(TensorMap) <= 128, "a CUtensorMap has 128 bytes");

// The parameters of a map, in the driver's order.
struct TensorMapRequest {
  uint32_t element_bytes, rank;
  uint64_t address;
  const uint64_t *sizes, *strides;
  const uint32_t *box, *element_strides;
  bool interleaved;
  uint32_t swizzle;
};

// Checks the rules of the driver's documentation; an error says which one is broken.
TensorMap encode(const TensorMapRequest& request);

// The map at an address that an instruction was given.
TensorMap tensor_map_at(uint64_t address);

// Where a byte that is meant for `address` of shared memory lies.
inline uint32_t swizzled(uint32_t address, int mode) {
  return address ^ (address >> 3 & ((1u << mode) - 1) << 4);
}

}  // namespace quaver::ptx
