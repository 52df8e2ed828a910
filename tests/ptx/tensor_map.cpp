#include "tensor_map.h"

#include <cstring>

#include "quaver/check.h"

namespace quaver::ptx {

uint64_t TensorMap::box_bytes() const {
  uint64_t bytes = element_bytes;
  for (const uint16_t n : box) bytes *= n;
  return bytes;
}

// CUDA driver API, cuTensorMapEncodeTiled.
TensorMap encode(const TensorMapRequest& r) {
  TensorMap map;
  if (r.rank < 1 || r.rank > 5) fail("tensor map: 1 to 5 axes, got ", r.rank);
  if (r.interleaved) fail("tensor map: interleaved layouts are not supported");
  if (r.address == 0 || r.address % 16 != 0)
    fail("tensor map: the address must be a multiple of 16, got ", r.address);
  map.rank = static_cast<uint8_t>(r.rank);
  map.element_bytes = static_cast<uint8_t>(r.element_bytes);
  map.swizzle = static_cast<uint8_t>(r.swizzle);
  map.address = r.address;
  for (uint32_t d = 0; d < r.rank; ++d) {
    if (r.sizes[d] == 0 || r.sizes[d] > uint64_t(1) << 32)
      fail("tensor map: axis ", d, " has ", r.sizes[d], " elements, not 1 to 2^32");
    if (r.box[d] == 0 || r.box[d] > 256)
      fail("tensor map: axis ", d, " of the box has ", r.box[d], " elements, not 1 to 256");
    if (r.element_strides[d] != 1) fail("tensor map: strides of elements are not supported");
    map.sizes[d] = r.sizes[d];
    map.box[d] = static_cast<uint16_t>(r.box[d]);
  }
  for (uint32_t d = 0; d + 1 < r.rank; ++d) {
    if (r.strides[d] % 16 != 0 || r.strides[d] >= uint64_t(1) << 40)
      fail("tensor map: a stride must be a multiple of 16 below 2^40, got ", r.strides[d]);
    map.strides[d] = r.strides[d];
  }
  const uint64_t inner = uint64_t(r.box[0]) * r.element_bytes;
  if (r.swizzle > 3) fail("tensor map: swizzle ", r.swizzle, " is not supported");
  if (inner % 16 != 0) fail("tensor map: a box of ", inner, " bytes, not a multiple of 16");
  if (r.swizzle != 0 && inner > 16u << r.swizzle)
    fail("tensor map: a box of ", inner, " bytes is wider than its swizzle of ", 16u << r.swizzle);
  return map;
}

TensorMap tensor_map_at(uint64_t address) {
  if (address % 64 != 0) fail("a tensor map at ", address, ", which is no multiple of 64");
  TensorMap map;
  std::memcpy(&map, reinterpret_cast<const void*>(address), sizeof(map));
  if (map.magic != TensorMap::kMagic) fail("there is no tensor map at ", address);
  return map;
}

}  // namespace quaver::ptx
