// Turns parsed statements into instructions with their operands' places, once for each kernel. An
// instruction that is not supported is an error with its line and text.
#pragma once

#include <map>
#include <utility>

#include "machine.h"

namespace quaver::ptx {

Program decode(Kernel kernel);

class Decoder {
 public:
  explicit Decoder(Program* program);

  // The place of a value of `bytes`; 0 is a predicate. Immediates and special registers get one.
  Slot source(const Operand& operand, int bytes);
  // The place of a result of `bytes`; what nobody wants (`_`) goes to a place of its own.
  Slot result(const Operand& operand, int bytes);
  // For loads, stores and conversions, whose registers may be wider than their type.
  Slot wide_source(const Operand& operand, int bytes);
  Slot wide_result(const Operand& operand, int bytes);
  void address(const Operand& operand, Space space, Instruction* in);

 private:
  Slot add_register(int bytes);
  Slot constant(uint64_t value, int bytes);
  Slot special(const std::string& name);
  Slot of_register(const Operand& operand) const;

  Program& program_;
  std::vector<Slot> registers_;
  std::map<std::pair<uint64_t, int>, Slot> constants_;
};

// Each knows a family of instructions, and returns false where `s` is none of them.
bool decode_arithmetic(Decoder& d, const Statement& s, Instruction* in);
bool decode_bits(Decoder& d, const Statement& s, Instruction* in);
bool decode_compare(Decoder& d, const Statement& s, Instruction* in);
bool decode_convert(Decoder& d, const Statement& s, Instruction* in);
bool decode_move(Decoder& d, const Statement& s, Instruction* in);
bool decode_memory(Decoder& d, const Statement& s, Instruction* in);
bool decode_atomic(Decoder& d, const Statement& s, Instruction* in);
bool decode_control(Decoder& d, const Statement& s, Instruction* in);
bool decode_fence(Decoder& d, const Statement& s, Instruction* in);
bool decode_cluster(Decoder& d, const Statement& s, Instruction* in);
bool decode_mbarrier(Decoder& d, const Statement& s, Instruction* in);
bool decode_bulk_copy(Decoder& d, const Statement& s, Instruction* in);
bool decode_element_copy(Decoder& d, const Statement& s, Instruction* in);
bool decode_matrix(Decoder& d, const Statement& s, Instruction* in);
bool decode_wgmma(Decoder& d, const Statement& s, Instruction* in);
bool decode_mma(Decoder& d, const Statement& s, Instruction* in);
bool decode_warp(Decoder& d, const Statement& s, Instruction* in);

// The n-th type among the modifiers of an opcode; Type::none where there is none.
Type type_at(const Statement& s, int n = 0);
// Refuses modifiers that are not in `known` and are no types: none may be ignored by accident.
void check_modifiers(const Statement& s, const std::vector<std::string>& known);
void check_operands(const Statement& s, size_t count);

}  // namespace quaver::ptx
