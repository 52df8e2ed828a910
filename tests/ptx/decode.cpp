#include "decode.h"

#include <algorithm>
#include <cstring>

#include "quaver/check.h"

namespace quaver::ptx {

namespace {

constexpr uint32_t kAlign = 64;
constexpr uint8_t kRegisters = 0, kConstants = 1;

using Decode = bool (*)(Decoder&, const Statement&, Instruction*);
constexpr Decode kFamilies[] = {
    decode_arithmetic, decode_bits,   decode_compare,  decode_convert,   decode_move,
    decode_memory,     decode_atomic, decode_control,  decode_fence,     decode_warp,
    decode_cluster,    decode_matrix, decode_mbarrier, decode_bulk_copy, decode_element_copy,
    decode_wgmma,      decode_mma};

void decode_statement(Decoder& d, const Statement& s, Instruction* in) {
  if (s.guard >= 0) {
    Operand guard;
    guard.kind = Operand::Kind::reg;
    guard.reg = s.guard;
    guard.negated = s.guard_negated;
    in->guard = d.source(guard, 0);
    in->guarded = true;
  }
  for (const Decode family : kFamilies)
    if (family(d, s, in)) return;
  fail("not supported");
}

}  // namespace

Program decode(Kernel kernel) {
  Program program;
  program.kernel = std::move(kernel);
  Decoder decoder(&program);
  program.code.resize(program.kernel.body.size());
  for (size_t i = 0; i < program.code.size(); ++i) {
    const Statement& s = program.kernel.body[i];
    Instruction& in = program.code[i];
    in.index = static_cast<int>(i);
    in.target = s.target;
    program.asynchronous = program.asynchronous || s.opcode[0] == "mbarrier" || s.has("mbarrier") ||
                           s.opcode[0] == "wgmma" || (s.opcode[0] == "cp" && s.has("bulk"));
    try {
      decode_statement(decoder, s, &in);
    } catch (const std::exception& error) {
      fail("ptx: line ", s.line, ": ", error.what(), ": ", s.text, " (kernel ", program.kernel.name,
           ")");
    }
  }
  mark_accumulators(&program);
  return program;
}

Decoder::Decoder(Program* program) : program_(*program) {
  for (const Type type : program_.kernel.registers)
    registers_.push_back(add_register(size_of(type)));
}

Slot Decoder::add_register(int bytes) {
  Slot s;
  s.size = static_cast<uint8_t>(bytes);
  const auto width = static_cast<uint32_t>(bytes == 0 ? sizeof(uint32_t) : bytes * kLanes);
  uint64_t& used = program_.register_bytes;
  if (bytes != 0) used = (used + kAlign - 1) / kAlign * kAlign;
  s.offset = static_cast<uint32_t>(used);
  used += width;
  return s;
}

Slot Decoder::constant(uint64_t value, int bytes) {
  const auto found = constants_.find({value, bytes});
  if (found != constants_.end()) return found->second;
  std::vector<uint64_t>& all = program_.constants;
  Slot s;
  s.bank = kConstants;
  s.size = static_cast<uint8_t>(bytes);
  s.offset = static_cast<uint32_t>(all.size() * sizeof(uint64_t));
  std::vector<unsigned char> lanes(std::max<size_t>(kAlign, size_t(bytes) * kLanes));
  const uint64_t predicate = value == 0 ? 0 : ~uint64_t(0);
  if (bytes == 0) std::memcpy(lanes.data(), &predicate, sizeof(predicate));
  for (int lane = 0; lane < kLanes; ++lane)
    std::memcpy(lanes.data() + lane * bytes, &value, static_cast<size_t>(bytes));
  all.resize(all.size() + lanes.size() / sizeof(uint64_t));
  std::memcpy(all.data() + all.size() - lanes.size() / sizeof(uint64_t), lanes.data(),
              lanes.size());
  return constants_[{value, bytes}] = s;
}

Slot Decoder::special(const std::string& name) {
  for (const Special& known : program_.specials)
    if (known.name == name) return known.slot;
  program_.specials.push_back({name, add_register(4)});
  return program_.specials.back().slot;
}

Slot Decoder::of_register(const Operand& operand) const {
  Slot s = registers_.at(operand.reg);
  s.negated = operand.negated;
  return s;
}

Slot Decoder::wide_source(const Operand& o, int bytes) {
  switch (o.kind) {
    case Operand::Kind::reg: {
      const Slot s = of_register(o);
      if (s.size < bytes) fail("operand ", o.name, " is too small");
      return s;
    }
    case Operand::Kind::immediate: return constant(o.value, bytes);
    case Operand::Kind::symbol: return constant(o.value, bytes);
    case Operand::Kind::special: return special(o.name);
    default: fail("an operand of a kind that does not fit");
  }
}

Slot Decoder::source(const Operand& o, int bytes) {
  const Slot s = wide_source(o, bytes);
  if (s.size != bytes) fail("operand ", o.name, " has ", int(s.size), " bytes and not ", bytes);
  return s;
}

Slot Decoder::wide_result(const Operand& o, int bytes) {
  if (o.kind == Operand::Kind::sink) return add_register(bytes);
  if (o.kind != Operand::Kind::reg) fail("a result that is no register");
  const Slot s = of_register(o);
  if (s.size < bytes) fail("result ", o.name, " is too small");
  return s;
}

Slot Decoder::result(const Operand& o, int bytes) {
  const Slot s = wide_result(o, bytes);
  if (s.size != bytes) fail("result ", o.name, " has ", int(s.size), " bytes and not ", bytes);
  return s;
}

// A 32-bit register may address shared memory; its values are extended by zeros.
void Decoder::address(const Operand& o, Space space, Instruction* in) {
  if (o.kind != Operand::Kind::memory) fail("an operand that is no address");
  in->space = space;
  in->displacement = static_cast<int64_t>(o.value);
  const Operand& base = o.parts.at(0);
  in->a = wide_source(base, base.kind == Operand::Kind::reg ? 4 : 8);
  if (in->a.size != 4 && in->a.size != 8) fail("an address of ", int(in->a.size), " bytes");
}

Type type_at(const Statement& s, int n) {
  for (size_t i = 1; i < s.opcode.size(); ++i) {
    const Type type = type_of(s.opcode[i]);
    if (type != Type::none && n-- == 0) return type;
  }
  return Type::none;
}

void check_modifiers(const Statement& s, const std::vector<std::string>& known) {
  for (size_t i = 1; i < s.opcode.size(); ++i)
    if (type_of(s.opcode[i]) == Type::none &&
        std::find(known.begin(), known.end(), s.opcode[i]) == known.end())
      fail("the modifier .", s.opcode[i], " is not supported");
}

void check_operands(const Statement& s, size_t count) {
  if (s.operands.size() != count) fail("takes ", count, " operands here, got ", s.operands.size());
}

}  // namespace quaver::ptx
