// mov, also of parts of a register, and cvta.
#include <cstring>

#include "decode.h"
#include "quaver/check.h"

namespace quaver::ptx {

namespace {

template <class T>
void copy(Warp& w, const Instruction& in, uint32_t lanes) {
  T* to = w.at<T>(in.to);
  const T* a = w.at<T>(in.a);
  for_lanes(lanes, [=](int i) { to[i] = a[i]; });
}

void copy_predicate(Warp& w, const Instruction& in, uint32_t lanes) {
  w.set_predicate(in.to, lanes, w.predicate(in.a));
}

// The first part is the lowest.
void pack(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    unsigned char* to = w.at<unsigned char>(in.to) + i * in.to.size;
    for (const Slot& part : in.more) {
      std::memcpy(to, w.at<unsigned char>(part) + i * part.size, part.size);
      to += part.size;
    }
  });
}

void unpack(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    unsigned char all[sizeof(uint64_t)];
    const unsigned char* from = all;
    std::memcpy(all, w.at<unsigned char>(in.a) + i * in.a.size, in.a.size);
    for (const Slot& part : in.more) {
      std::memcpy(w.at<unsigned char>(part) + i * part.size, from, part.size);
      from += part.size;
    }
  });
}

// cvta.space makes a generic address, which for shared and local memory lies in a window.
void to_generic(Warp& w, const Instruction& in, uint32_t lanes) {
  uint64_t* to = w.at<uint64_t>(in.to);
  const uint64_t* a = w.at<uint64_t>(in.a);
  const auto base = static_cast<uint64_t>(in.displacement);
  const uint64_t parameters = in.space == Space::param
                                  ? reinterpret_cast<uint64_t>(w.machine->launch->parameters.data())
                                  : 0;
  for_lanes(lanes, [=](int i) { to[i] = a[i] + base + parameters; });
}

bool decode_cvta(Decoder& d, const Statement& s, Instruction* in) {
  check_modifiers(s, {"to", "global", "shared", "local", "param"});
  check_operands(s, 2);
  const bool back = s.has("to");
  in->space = s.has("param") ? Space::param : Space::generic;
  const uint64_t window = s.has("shared") ? kSharedWindow : s.has("local") ? kLocalWindow : 0;
  if (in->space == Space::param && back) return false;
  in->displacement = static_cast<int64_t>(back ? 0 - window : window);
  in->to = d.result(s.operands[0], 8);
  in->a = d.source(s.operands[1], 8);
  in->run = to_generic;
  return true;
}

}  // namespace

bool decode_move(Decoder& d, const Statement& s, Instruction* in) {
  if (s.opcode[0] == "cvta") return decode_cvta(d, s, in);
  if (s.opcode[0] != "mov") return false;
  check_modifiers(s, {});
  check_operands(s, 2);
  const int bytes = size_of(type_at(s));
  const Operand &to = s.operands[0], &from = s.operands[1];
  const bool packs = from.kind == Operand::Kind::vector;
  if (packs || to.kind == Operand::Kind::vector) {
    const std::vector<Operand>& parts = packs ? from.parts : to.parts;
    const int size = bytes / static_cast<int>(parts.size());
    for (const Operand& part : parts)
      in->more.push_back(packs ? d.source(part, size) : d.result(part, size));
    (packs ? in->to : in->a) = packs ? d.result(to, bytes) : d.source(from, bytes);
    in->run = packs ? pack : unpack;
    return true;
  }
  in->to = d.result(to, bytes);
  in->a = d.source(from, bytes);
  in->run = bytes == 0   ? copy_predicate
            : bytes == 2 ? copy<uint16_t>
            : bytes == 4 ? copy<uint32_t>
                         : copy<uint64_t>;
  return true;
}

}  // namespace quaver::ptx
