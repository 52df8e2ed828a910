// and, or, xor, not, shl, shr, prmt, bfi.
#include <algorithm>

#include "decode.h"
#include "quaver/check.h"

namespace quaver::ptx {

namespace {

struct And {
  template <class T> static T of(T a, T b) { return a & b; }
};
struct Or {
  template <class T> static T of(T a, T b) { return a | b; }
};
struct Xor {
  template <class T> static T of(T a, T b) { return a ^ b; }
};

template <class T, class F>
void logic(Warp& w, const Instruction& in, uint32_t lanes) {
  T* to = w.at<T>(in.to);
  const T *a = w.at<T>(in.a), *b = w.at<T>(in.b);
  for_lanes(lanes, [=](int i) { to[i] = F::of(a[i], b[i]); });
}

template <class F>
void predicate_logic(Warp& w, const Instruction& in, uint32_t lanes) {
  w.set_predicate(in.to, lanes, F::of(w.predicate(in.a), w.predicate(in.b)));
}

template <class F>
Handler logic_of(int bytes) {
  switch (bytes) {
    case 0: return predicate_logic<F>;
    case 2: return logic<uint16_t, F>;
    case 4: return logic<uint32_t, F>;
    case 8: return logic<uint64_t, F>;
    default: return nullptr;
  }
}

template <class T>
void complement(Warp& w, const Instruction& in, uint32_t lanes) {
  T* to = w.at<T>(in.to);
  const T* a = w.at<T>(in.a);
  for_lanes(lanes, [=](int i) { to[i] = static_cast<T>(~a[i]); });
}

void predicate_complement(Warp& w, const Instruction& in, uint32_t lanes) {
  w.set_predicate(in.to, lanes, ~w.predicate(in.a));
}

// Shifts by the width or more give 0, or the sign.
template <class T>
void shift_left(Warp& w, const Instruction& in, uint32_t lanes) {
  constexpr uint32_t width = 8 * sizeof(T);
  T* to = w.at<T>(in.to);
  const T* a = w.at<T>(in.a);
  const uint32_t* by = w.at<uint32_t>(in.b);
  for_lanes(lanes, [=](int i) {
    to[i] = by[i] >= width ? T(0) : static_cast<T>(a[i] << (by[i] & (width - 1)));
  });
}

template <class T>
void shift_right(Warp& w, const Instruction& in, uint32_t lanes) {
  constexpr uint32_t width = 8 * sizeof(T);
  T* to = w.at<T>(in.to);
  const T* a = w.at<T>(in.a);
  const uint32_t* by = w.at<uint32_t>(in.b);
  for_lanes(lanes, [=](int i) {
    const T half = static_cast<T>(a[i] >> std::min(by[i], width - 1));
    to[i] = by[i] >= width ? static_cast<T>(half >> 1) : half;
  });
}

Handler shift_of(const Statement& s, Type type) {
  const bool left = s.opcode[0] == "shl";
  switch (size_of(type)) {
    case 2:
      if (left) return shift_left<uint16_t>;
      return is_signed(type) ? shift_right<int16_t> : shift_right<uint16_t>;
    case 4:
      if (left) return shift_left<uint32_t>;
      return is_signed(type) ? shift_right<int32_t> : shift_right<uint32_t>;
    case 8:
      if (left) return shift_left<uint64_t>;
      return is_signed(type) ? shift_right<int64_t> : shift_right<uint64_t>;
    default: return nullptr;
  }
}

// Each four bits of the selector choose a byte of {b, a}; their highest spreads its sign.
void permute(Warp& w, const Instruction& in, uint32_t lanes) {
  uint32_t* to = w.at<uint32_t>(in.to);
  const uint32_t *a = w.at<uint32_t>(in.a), *b = w.at<uint32_t>(in.b), *c = w.at<uint32_t>(in.c);
  for_lanes(lanes, [=](int i) {
    const uint64_t bytes = uint64_t(b[i]) << 32 | a[i];
    uint32_t result = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t selector = c[i] >> 4 * k & 15;
      uint32_t byte = bytes >> 8 * (selector & 7) & 0xff;
      if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
      result |= byte << 8 * k;
    }
    to[i] = result;
  });
}

// Inserts the low `length` bits of a into b at a position.
void insert_bits(Warp& w, const Instruction& in, uint32_t lanes) {
  uint32_t* to = w.at<uint32_t>(in.to);
  const uint32_t *a = w.at<uint32_t>(in.a), *b = w.at<uint32_t>(in.b), *c = w.at<uint32_t>(in.c);
  const uint32_t* more = w.at<uint32_t>(in.more[0]);
  for_lanes(lanes, [=](int i) {
    const uint32_t at = c[i] & 0xff, length = more[i] & 0xff;
    const uint64_t ones = length >= 32 ? 0xffffffffu : (uint64_t(1) << length) - 1;
    const auto mask = static_cast<uint32_t>(at >= 32 ? 0 : ones << at);
    const auto moved = static_cast<uint32_t>(at >= 32 ? 0 : uint64_t(a[i]) << at);
    to[i] = (b[i] & ~mask) | (moved & mask);
  });
}

bool decode_ternary(Decoder& d, const Statement& s, Instruction* in) {
  const bool insert = s.opcode[0] == "bfi";
  if (!insert && s.opcode[0] != "prmt") return false;
  if (type_at(s) != Type::b32) fail("only .b32 is supported");
  check_modifiers(s, {});
  check_operands(s, insert ? 5 : 4);
  in->run = insert ? insert_bits : permute;
  in->to = d.result(s.operands[0], 4);
  in->a = d.source(s.operands[1], 4);
  in->b = d.source(s.operands[2], 4);
  in->c = d.source(s.operands[3], 4);
  if (insert) in->more.push_back(d.source(s.operands[4], 4));
  return true;
}

}  // namespace

bool decode_bits(Decoder& d, const Statement& s, Instruction* in) {
  if (decode_ternary(d, s, in)) return true;
  const std::string& op = s.opcode[0];
  const bool shift = op == "shl" || op == "shr", one = op == "not";
  if (!shift && !one && op != "and" && op != "or" && op != "xor") return false;
  const Type type = type_at(s);
  const int bytes = size_of(type);
  if (shift)
    in->run = shift_of(s, type);
  else if (one)
    in->run = bytes == 0   ? predicate_complement
              : bytes == 2 ? complement<uint16_t>
              : bytes == 4 ? complement<uint32_t>
                           : complement<uint64_t>;
  else
    in->run = op == "and"  ? logic_of<And>(bytes)
              : op == "or" ? logic_of<Or>(bytes)
                           : logic_of<Xor>(bytes);
  if (!in->run) return false;
  check_modifiers(s, {});
  check_operands(s, one ? 2 : 3);
  in->to = d.result(s.operands[0], bytes);
  in->a = d.source(s.operands[1], bytes);
  if (!one) in->b = d.source(s.operands[2], shift ? 4 : bytes);
  return true;
}

}  // namespace quaver::ptx
