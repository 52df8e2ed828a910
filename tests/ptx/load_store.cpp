// ld and st, of vectors too, and atomic operations.
#include <algorithm>
#include <cstring>

#include "access.h"
#include "decode.h"
#include "quaver/check.h"

namespace quaver::ptx {

namespace {

Space space_of(const Statement& s) {
  if (s.has("global")) return Space::global;
  if (s.has("shared") || s.has("shared::cta")) return Space::shared;
  if (s.has("local")) return Space::local;
  return s.has("param") ? Space::param : Space::generic;
}

// A register may be wider than the value: it is extended.
template <class T>
inline void put(const Warp& w, const Slot& to, int lane, T value) {
  switch (to.size) {
    case 2: w.at<uint16_t>(to)[lane] = static_cast<uint16_t>(value); break;
    case 4: w.at<uint32_t>(to)[lane] = static_cast<uint32_t>(value); break;
    default: w.at<uint64_t>(to)[lane] = static_cast<uint64_t>(value);
  }
}

template <class T>
void load(Warp& w, const Instruction& in, uint32_t lanes) {
  const uint64_t bytes = sizeof(T) * in.more.size();
  count_request(w, in, lanes, bytes, false);
  for_lanes(lanes, [&](int i) {
    const unsigned char* from = reach(w, in, i, address_of(w, in, i), bytes, Access::read);
    for (const Slot& to : in.more) {
      T value;
      std::memcpy(&value, from, sizeof(T));
      put(w, to, i, value);
      from += sizeof(T);
    }
  });
}

// Loops over such loads wait for other CTAs.
template <class T>
void load_acquire(Warp& w, const Instruction& in, uint32_t lanes) {
  load<T>(w, in, lanes);
  poll(&w, w.pc + 1);
}

template <class T>
void store(Warp& w, const Instruction& in, uint32_t lanes) {
  const uint64_t bytes = sizeof(T) * in.more.size();
  count_request(w, in, lanes, bytes, true);
  for_lanes(lanes, [&](int i) {
    unsigned char* to = reach(w, in, i, address_of(w, in, i), bytes, Access::write);
    for (const Slot& from : in.more) {
      std::memcpy(to, w.at<unsigned char>(from) + i * from.size, sizeof(T));
      to += sizeof(T);
    }
  });
}

Handler load_of(Type type) {
  switch (size_of(type)) {
    case 1: return is_signed(type) ? load<int8_t> : load<uint8_t>;
    case 2: return is_signed(type) ? load<int16_t> : load<uint16_t>;
    case 4: return is_signed(type) ? load<int32_t> : load<uint32_t>;
    default: return load<uint64_t>;
  }
}

Handler store_of(Type type) {
  switch (size_of(type)) {
    case 1: return store<uint8_t>;
    case 2: return store<uint16_t>;
    case 4: return store<uint32_t>;
    default: return store<uint64_t>;
  }
}

struct Max {
  template <class T> static T of(T a, T b) { return std::max(a, b); }
};
struct Min {
  template <class T> static T of(T a, T b) { return std::min(a, b); }
};
struct Add {
  template <class T> static T of(T a, T b) { return a + b; }
};

template <class T, class F>
void update(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    unsigned char* memory = reach(w, in, i, address_of(w, in, i), sizeof(T), Access::atomic);
    T before;
    std::memcpy(&before, memory, sizeof(T));
    const T after = F::of(before, w.at<T>(in.b)[i]);
    std::memcpy(memory, &after, sizeof(T));
    w.at<T>(in.to)[i] = before;
  });
}

template <class T>
Handler update_of(const Statement& s) {
  if (s.has("add")) return update<T, Add>;
  if (s.has("max")) return update<T, Max>;
  return s.has("min") ? update<T, Min> : nullptr;
}

Handler update_of(const Statement& s, Type type) {
  switch (type) {
    case Type::s32: return s.has("add") ? update_of<uint32_t>(s) : update_of<int32_t>(s);
    case Type::u32: return update_of<uint32_t>(s);
    case Type::u64: return update_of<uint64_t>(s);
    case Type::f32: return s.has("add") ? update<float, Add> : nullptr;
    default: return nullptr;
  }
}

const std::vector<std::string> kHints = {
    "global", "shared",   "shared::cta", "local",   "param",          "v2",
    "v4",     "volatile", "relaxed",     "acquire", "release",        "gpu",
    "cta",    "sys",      "weak",        "nc",      "L1::no_allocate"};

}  // namespace

bool decode_memory(Decoder& d, const Statement& s, Instruction* in) {
  const bool loads = s.opcode[0] == "ld";
  if (!loads && s.opcode[0] != "st") return false;
  check_modifiers(s, kHints);
  check_operands(s, 2);
  const Type type = type_at(s);
  const Operand &memory = s.operands[loads ? 1 : 0], &value = s.operands[loads ? 0 : 1];
  const size_t count = s.has("v4") ? 4 : s.has("v2") ? 2 : 1;
  const bool vector = value.kind == Operand::Kind::vector;
  if ((vector ? value.parts.size() : 1) != count) fail("a vector of another length");
  in->bytes = static_cast<uint8_t>(size_of(type));
  for (size_t i = 0; i < count; ++i) {
    const Operand& one = vector ? value.parts[i] : value;
    const int least = std::max(2, int(in->bytes));
    in->more.push_back(loads ? d.wide_result(one, least) : d.wide_source(one, least));
  }
  d.address(memory, space_of(s), in);
  in->run = loads ? load_of(type) : store_of(type);
  if (loads && s.has("acquire")) in->run = type == Type::b32 ? load_acquire<uint32_t> : nullptr;
  if (!in->run) return false;
  return true;
}

bool decode_atomic(Decoder& d, const Statement& s, Instruction* in) {
  const bool result = s.opcode[0] == "atom";
  if (!result && s.opcode[0] != "red") return false;
  std::vector<std::string> known = kHints;
  known.insert(known.end(), {"add", "max", "min"});
  check_modifiers(s, known);
  check_operands(s, result ? 3 : 2);
  const Type type = type_at(s);
  in->run = update_of(s, type);
  if (!in->run) return false;
  in->bytes = static_cast<uint8_t>(size_of(type));
  in->to = d.result(result ? s.operands[0] : Operand{}, in->bytes);
  d.address(s.operands[result ? 1 : 0], space_of(s), in);
  in->b = d.source(s.operands[result ? 2 : 1], in->bytes);
  return true;
}

}  // namespace quaver::ptx
