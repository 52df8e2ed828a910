// stmatrix and ldmatrix: 8 x 8 tiles of 16-bit values between registers and shared memory. Lane
// 8 j + r has the address of row r of tile j; lane 4 r + c holds two values of row r.
#include <cstring>

#include "access.h"
#include "decode.h"
#include "quaver/check.h"

namespace quaver::ptx {

namespace {

constexpr uint64_t kRowBytes = 16;

// Calls f(tile, row, memory of the row) for each row that lanes name.
template <class F>
void for_tile_rows(Warp& w, const Instruction& in, Access kind, F f) {
  for (int tile = 0; tile < static_cast<int>(in.more.size()); ++tile)
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * tile + row;
      f(tile, row, reach(w, in, lane, address_of(w, in, lane), kRowBytes, kind));
    }
}

void store_matrix(Warp& w, const Instruction& in, uint32_t lanes) {
  check_aligned(w, lanes);
  for_tile_rows(w, in, Access::write, [&](int tile, int row, unsigned char* memory) {
    std::memcpy(memory, w.at<uint32_t>(in.more[tile]) + 4 * row, kRowBytes);
  });
}

void load_matrix(Warp& w, const Instruction& in, uint32_t lanes) {
  check_aligned(w, lanes);
  const auto named = static_cast<int>(8 * in.more.size());  // lanes that have the address of a row
  count_request(w, in, 0xffffffffu >> (kLanes - named), kRowBytes, false);
  for_tile_rows(w, in, Access::read, [&](int tile, int row, const unsigned char* memory) {
    std::memcpy(w.at<uint32_t>(in.more[tile]) + 4 * row, memory, kRowBytes);
  });
}

}  // namespace

bool decode_matrix(Decoder& d, const Statement& s, Instruction* in) {
  const bool loads = s.opcode[0] == "ldmatrix";
  if (!loads && s.opcode[0] != "stmatrix") return false;
  check_modifiers(s, {"sync", "aligned", "m8n8", "x1", "x2", "x4", "shared", "shared::cta"});
  check_operands(s, 2);
  const Operand &memory = s.operands[loads ? 1 : 0], &values = s.operands[loads ? 0 : 1];
  const size_t tiles = s.has("x4") ? 4 : s.has("x2") ? 2 : 1;
  if (values.kind != Operand::Kind::vector || values.parts.size() != tiles)
    fail("a vector of another length");
  for (const Operand& part : values.parts)
    in->more.push_back(loads ? d.result(part, 4) : d.source(part, 4));
  d.address(memory, Space::shared, in);
  in->run = loads ? load_matrix : store_matrix;
  return true;
}

}  // namespace quaver::ptx
