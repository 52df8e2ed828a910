// mma.sync: 16 x 8 x 32 products of FP8 operands in the registers of one warp. PTX ISA, 9.7.14.5.
#include <algorithm>

#include "decode.h"
#include "quaver/check.h"
#include "tensor_core.h"

namespace quaver::ptx {

namespace {

constexpr int kRows = 16, kColumns = 8;
constexpr size_t kSums = 4, kOfA = 4, kOfB = 2;
constexpr int64_t kSecondA = 1, kSecondB = 2;  // in.displacement: e5m2, not e4m3

// Lane 4 g + c has of A rows g and g + 8 (registers 0, 2 and 1, 3), of B column g; in each, bytes
// 4 c.. of the first half of K and of the second.
void compute_product(Warp& w, const Instruction& in, uint32_t lanes) {
  check_aligned(w, lanes);
  const Slot* of_b = in.more.data() + kOfA;
  const float* values_a = fp8_values(in.displacement & kSecondA);
  const float* values_b = fp8_values(in.displacement & kSecondB);
  static thread_local float b[kProductDepth][kProductColumns];
  float a[kRows][kProductDepth], sums[kRows][kColumns];
  const auto byte = [&](const Slot& s, int lane, int k) {
    return w.at<uint32_t>(s)[lane] >> k % 4 * 8 & 0xff;
  };
  for (int k = 0; k < kProductDepth; ++k) {
    const int half = k / 16, c = k % 16 / 4;
    for (int row = 0; row < kRows; ++row)
      a[row][k] = values_a[byte(in.more[half * 2 + row / 8], row % 8 * 4 + c, k)];
    for (int column = 0; column < kColumns; ++column)
      b[k][column] = values_b[byte(of_b[half], column * 4 + c, k)];
  }
  const auto element = [&](const Slot* of, int row, int column) {
    return w.at<float>(of[row / 8 * 2 + column % 2]) + row % 8 * 4 + column / 2;
  };
  const Slot* addends = in.more.data() + kOfA + kOfB;
  for (int row = 0; row < kRows; ++row)
    for (int column = 0; column < kColumns; ++column)
      sums[row][column] = *element(addends, row, column);
  const auto add = w.machine->launch->timing.cut_sums ? add_cut : add_exact;
  for (int row = 0; row < kRows; ++row) {
    add(sums[row], a[row], b, kColumns);
    for (int column = 0; column < kColumns; ++column)
      *element(addends + kSums, row, column) = sums[row][column];
  }
}

}  // namespace

// mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e5m2.f32 d, a, b, c
bool decode_mma(Decoder& d, const Statement& s, Instruction* in) {
  if (s.opcode[0] != "mma") return false;
  const auto is_fp8 = [](const std::string& type) { return type == "e4m3" || type == "e5m2"; };
  const std::vector<std::string> form = {"mma", "sync", "aligned", "m16n8k32", "row", "col", "f32"};
  if (s.opcode.size() != 10 || !std::equal(form.begin(), form.end(), s.opcode.begin()) ||
      !is_fp8(s.opcode[7]) || !is_fp8(s.opcode[8]) || s.opcode[9] != "f32")
    return false;
  check_operands(s, 4);
  const size_t counts[] = {kSums, kOfA, kOfB, kSums};
  for (const int i : {1, 2, 3, 0}) {  // the order of in->more
    const Operand& o = s.operands[i];
    if (o.kind != Operand::Kind::vector || o.parts.size() != counts[i])
      fail("a vector of another length");
    for (const Operand& part : o.parts)
      in->more.push_back(i == 0 ? d.result(part, 4) : d.source(part, 4));
  }
  in->displacement =
      (s.opcode[7] == "e5m2" ? kSecondA : 0) | (s.opcode[8] == "e5m2" ? kSecondB : 0);
  in->run = compute_product;
  return true;
}

}  // namespace quaver::ptx
