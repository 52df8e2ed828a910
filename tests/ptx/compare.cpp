// setp and selp.
#include <cmath>

#include "decode.h"
#include "quaver/check.h"

namespace quaver::ptx {

namespace {

// Comparisons of floats are false where one is NaN, except those that end in u.
struct Eq {
  template <class T> static bool of(T a, T b) { return a == b; }
};
struct Ne {
  template <class T> static bool of(T a, T b) { return a < b || a > b; }
};
struct Lt {
  template <class T> static bool of(T a, T b) { return a < b; }
};
struct Le {
  template <class T> static bool of(T a, T b) { return a <= b; }
};
struct Gt {
  template <class T> static bool of(T a, T b) { return a > b; }
};
struct Ge {
  template <class T> static bool of(T a, T b) { return a >= b; }
};
struct Num {
  template <class T> static bool of(T a, T b) { return a == a && b == b; }
};
template <class Opposite>
struct Not {
  template <class T> static bool of(T a, T b) { return !Opposite::of(a, b); }
};

template <class T, class F>
void compare(Warp& w, const Instruction& in, uint32_t lanes) {
  const T *a = w.at<T>(in.a), *b = w.at<T>(in.b);
  uint32_t bits = 0;
  if (lanes == 0xffffffffu)
    for (int i = 0; i < kLanes; ++i) bits |= uint32_t(F::of(a[i], b[i])) << i;
  else
    for_lanes(lanes, [&](int i) { bits |= uint32_t(F::of(a[i], b[i])) << i; });
  w.set_predicate(in.to, lanes, bits);
}

template <class F>
Handler compare_of(Type type) {
  switch (type) {
    case Type::b16:
    case Type::u16: return compare<uint16_t, F>;
    case Type::s16: return compare<int16_t, F>;
    case Type::b32:
    case Type::u32: return compare<uint32_t, F>;
    case Type::s32: return compare<int32_t, F>;
    case Type::b64:
    case Type::u64: return compare<uint64_t, F>;
    case Type::s64: return compare<int64_t, F>;
    case Type::f32: return compare<float, F>;
    case Type::f64: return compare<double, F>;
    default: return nullptr;
  }
}

Handler compare_of(const std::string& how, Type type) {
  if (how == "eq") return compare_of<Eq>(type);
  if (how == "ne") return compare_of<Ne>(type);
  if (how == "lt") return compare_of<Lt>(type);
  if (how == "le") return compare_of<Le>(type);
  if (how == "gt") return compare_of<Gt>(type);
  if (how == "ge") return compare_of<Ge>(type);
  if (type != Type::f32 && type != Type::f64) return nullptr;
  if (how == "equ") return compare_of<Not<Ne>>(type);
  if (how == "neu") return compare_of<Not<Eq>>(type);
  if (how == "ltu") return compare_of<Not<Ge>>(type);
  if (how == "leu") return compare_of<Not<Gt>>(type);
  if (how == "gtu") return compare_of<Not<Le>>(type);
  if (how == "geu") return compare_of<Not<Lt>>(type);
  if (how == "num") return compare_of<Num>(type);
  if (how == "nan") return compare_of<Not<Num>>(type);
  return nullptr;
}

template <class T>
void choose(Warp& w, const Instruction& in, uint32_t lanes) {
  T* to = w.at<T>(in.to);
  const T *a = w.at<T>(in.a), *b = w.at<T>(in.b);
  const uint32_t first = w.predicate(in.c);
  for_lanes(lanes, [=](int i) { to[i] = first >> i & 1 ? a[i] : b[i]; });
}

}  // namespace

bool decode_compare(Decoder& d, const Statement& s, Instruction* in) {
  const Type type = type_at(s);
  if (s.opcode[0] == "selp") {
    check_operands(s, 4);
    check_modifiers(s, {});
    const int bytes = size_of(type);
    in->run = bytes == 2 ? choose<uint16_t> : bytes == 4 ? choose<uint32_t> : choose<uint64_t>;
    in->to = d.result(s.operands[0], bytes);
    in->a = d.source(s.operands[1], bytes);
    in->b = d.source(s.operands[2], bytes);
    in->c = d.source(s.operands[3], 0);
    return bytes >= 2;
  }
  if (s.opcode[0] != "setp" || s.opcode.size() != 3) return false;
  in->run = compare_of(s.opcode[1], type);
  if (!in->run) return false;
  check_operands(s, 3);
  in->to = d.result(s.operands[0], 0);
  in->a = d.source(s.operands[1], size_of(type));
  in->b = d.source(s.operands[2], size_of(type));
  return true;
}

}  // namespace quaver::ptx
