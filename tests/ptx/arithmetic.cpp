// add, sub, mul, mad, fma, div, rem, min, max, neg, abs, sqrt, rcp of integers and floats.
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "decode.h"
#include "formats.h"
#include "quaver/check.h"

namespace quaver::ptx {

namespace {

// f32 instructions give one NaN, whatever came in; f64 ones keep the host's.
inline float canonical(float x) {
  const uint32_t nan = 0x7fffffffu;
  float result;
  std::memcpy(&result, &nan, sizeof(result));
  return x != x ? result : x;
}
inline double canonical(double x) { return x; }
template <class T>
inline std::enable_if_t<std::is_integral_v<T>, T> canonical(T x) {
  return x;
}

// Integers wrap around.
template <class T, class F>
inline T wrapped(T a, T b, F f) {
  if constexpr (std::is_integral_v<T>) {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<U>(f(static_cast<U>(a), static_cast<U>(b))));
  } else {
    return f(a, b);
  }
}

struct Add {
  template <class T> static T of(T a, T b) {
    return wrapped(a, b, [](auto x, auto y) { return x + y; });
  }
};
struct Sub {
  template <class T> static T of(T a, T b) {
    return wrapped(a, b, [](auto x, auto y) { return x - y; });
  }
};
struct Mul {
  template <class T> static T of(T a, T b) {
    if constexpr (sizeof(T) == 2)
      return static_cast<T>(uint32_t(a) * uint32_t(b));
    else
      return wrapped(a, b, [](auto x, auto y) { return x * y; });
  }
};
struct MulHigh {
  template <class T> static T of(T a, T b) {
    if constexpr (sizeof(T) == 8) {
      using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
      return static_cast<T>(Wide(a) * Wide(b) >> 64);
    } else {
      using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
      return static_cast<T>(Wide(a) * Wide(b) >> 8 * sizeof(T));
    }
  }
};
struct Div {
  template <class T> static T of(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      if (b == 0) fail("division by zero");
      if (std::is_signed_v<T> && b == static_cast<T>(-1)) return Sub::of(T(0), a);
    }
    return a / b;
  }
};
struct Rem {
  template <class T> static T of(T a, T b) {
    if (b == 0) fail("remainder of a division by zero");
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return a % b;
  }
};
// A number wins over NaN, and -0 lies below +0.
struct Min {
  template <class T> static T of(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
      if (a != a || b != b) return a != a ? b : a;
      if (a == b) return std::signbit(a) ? a : b;
    }
    return b < a ? b : a;
  }
};
struct Max {
  template <class T> static T of(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
      if (a != a || b != b) return a != a ? b : a;
      if (a == b) return std::signbit(a) ? b : a;
    }
    return a < b ? b : a;
  }
};

// min.NaN and max.NaN: NaN wins over a number.
template <class F>
struct NanWins {
  template <class T> static T of(T a, T b) { return a != a || b != b ? a + b : F::of(a, b); }
};
// Of magnitudes, under the product of the signs.
template <class F>
struct XorSign {
  template <class T> static T of(T a, T b) {
    const T x = F::of(std::fabs(a), std::fabs(b));
    return std::signbit(a) != std::signbit(b) ? -x : x;
  }
};

template <class T, class F>
void binary(Warp& w, const Instruction& in, uint32_t lanes) {
  T* to = w.at<T>(in.to);
  const T *a = w.at<T>(in.a), *b = w.at<T>(in.b);
  for_lanes(lanes, [=](int i) { to[i] = canonical(F::of(a[i], b[i])); });
}

// mul.wide and mad.wide: the result has twice the bits.
template <class T, class Wide>
void multiply_wide(Warp& w, const Instruction& in, uint32_t lanes) {
  Wide* to = w.at<Wide>(in.to);
  const T *a = w.at<T>(in.a), *b = w.at<T>(in.b);
  for_lanes(lanes, [=](int i) { to[i] = static_cast<Wide>(Wide(a[i]) * Wide(b[i])); });
}

template <class T, class Wide>
void multiply_add_wide(Warp& w, const Instruction& in, uint32_t lanes) {
  Wide* to = w.at<Wide>(in.to);
  const T *a = w.at<T>(in.a), *b = w.at<T>(in.b);
  const Wide* c = w.at<Wide>(in.c);
  for_lanes(lanes,
            [=](int i) { to[i] = Add::of(static_cast<Wide>(Wide(a[i]) * Wide(b[i])), c[i]); });
}

template <class T, class F>
void multiply_add(Warp& w, const Instruction& in, uint32_t lanes) {
  T* to = w.at<T>(in.to);
  const T *a = w.at<T>(in.a), *b = w.at<T>(in.b), *c = w.at<T>(in.c);
  for_lanes(lanes, [=](int i) { to[i] = Add::of(F::of(a[i], b[i]), c[i]); });
}

template <class T>
void fused_multiply_add(Warp& w, const Instruction& in, uint32_t lanes) {
  T* to = w.at<T>(in.to);
  const T *a = w.at<T>(in.a), *b = w.at<T>(in.b), *c = w.at<T>(in.c);
  for_lanes(lanes, [=](int i) { to[i] = canonical(std::fma(a[i], b[i], c[i])); });
}

// add.rz: the sum to nearest is one float too large where it is farther from zero than the exact
// one, which the f64 sum's error tells.
float add_toward_zero(float a, float b) {
  const double sum = double(a) + b, large = std::fabs(a) < std::fabs(b) ? b : a;
  const double lost = (std::fabs(a) < std::fabs(b) ? a : b) - (sum - large);  // by `sum`
  const float near = static_cast<float>(sum);
  if (std::isinf(near) && std::isfinite(sum))
    return std::copysign(std::numeric_limits<float>::max(), near);
  const double over = (double(near) - sum) - lost;
  const bool away = near > 0.0f ? over > 0.0 : over < 0.0;
  return canonical(away && std::isfinite(near) ? std::nextafter(near, 0.0f) : near);
}

void add_rz(Warp& w, const Instruction& in, uint32_t lanes) {
  float* to = w.at<float>(in.to);
  const float *a = w.at<float>(in.a), *b = w.at<float>(in.b);
  for_lanes(lanes, [=](int i) { to[i] = add_toward_zero(a[i], b[i]); });
}

// Halves of a register as f16.
void multiply_halves(Warp& w, const Instruction& in, uint32_t lanes) {
  uint32_t* to = w.at<uint32_t>(in.to);
  const uint32_t *a = w.at<uint32_t>(in.a), *b = w.at<uint32_t>(in.b);
  for_lanes(lanes, [=](int i) {
    const auto product = [&](int shift) {  // exact in f32, unless f16 has no digits for it
      const float x = decode(a[i] >> shift & 0xffff, kF16),
                  y = decode(b[i] >> shift & 0xffff, kF16);
      return encode(x * y, kF16, true, false);
    };
    to[i] = product(16) << 16 | product(0);
  });
}

struct Neg {
  template <class T> static T of(T a) {
    if constexpr (std::is_integral_v<T>)
      return Sub::of(T(0), a);
    else
      return -a;
  }
};
struct Abs {
  template <class T> static T of(T a) {
    if constexpr (std::is_integral_v<T>)
      return a < 0 ? Sub::of(T(0), a) : a;
    else
      return std::fabs(a);
  }
};
struct Sqrt {
  template <class T> static T of(T a) { return canonical(std::sqrt(a)); }
};
struct Rcp {
  template <class T> static T of(T a) { return canonical(T(1) / a); }
};

template <class T, class F>
void unary(Warp& w, const Instruction& in, uint32_t lanes) {
  T* to = w.at<T>(in.to);
  const T* a = w.at<T>(in.a);
  for_lanes(lanes, [=](int i) { to[i] = F::of(a[i]); });
}

template <class F>
Handler binary_of(Type type) {
  switch (type) {
    case Type::u16: return binary<uint16_t, F>;
    case Type::s16: return binary<int16_t, F>;
    case Type::u32: return binary<uint32_t, F>;
    case Type::s32: return binary<int32_t, F>;
    case Type::u64: return binary<uint64_t, F>;
    case Type::s64: return binary<int64_t, F>;
    default: return nullptr;
  }
}

template <class F>
Handler float_binary_of(Type type) {
  if (type == Type::f32) return binary<float, F>;
  if (type == Type::f64) return binary<double, F>;
  return binary_of<F>(type);
}

// min and max with the modifiers that f32 alone has.
template <class F>
Handler extreme_of(const Statement& s, Type type) {
  const bool nan = s.has("NaN"), signs = s.has("xorsign");
  if (!nan && !signs) return float_binary_of<F>(type);
  if (type != Type::f32 || signs != s.has("abs")) return nullptr;
  if (!signs) return binary<float, NanWins<F>>;
  return nan ? binary<float, XorSign<NanWins<F>>> : binary<float, XorSign<F>>;
}

template <class F>
Handler multiply_add_of(Type type) {
  switch (type) {
    case Type::u32: return multiply_add<uint32_t, F>;
    case Type::s32: return multiply_add<int32_t, F>;
    case Type::u64: return multiply_add<uint64_t, F>;
    case Type::s64: return multiply_add<int64_t, F>;
    default: return nullptr;
  }
}

Handler wide_of(Type type, bool adds) {
  switch (type) {
    case Type::u16: return adds ? nullptr : multiply_wide<uint16_t, uint32_t>;
    case Type::s16: return adds ? nullptr : multiply_wide<int16_t, int32_t>;
    case Type::u32:
      return adds ? multiply_add_wide<uint32_t, uint64_t> : multiply_wide<uint32_t, uint64_t>;
    case Type::s32:
      return adds ? multiply_add_wide<int32_t, int64_t> : multiply_wide<int32_t, int64_t>;
    default: return nullptr;
  }
}

template <class F>
Handler unary_of(Type type, bool integers) {
  if (type == Type::f32) return unary<float, F>;
  if (type == Type::f64) return unary<double, F>;
  if (!integers) return nullptr;
  if (type == Type::s32) return unary<int32_t, F>;
  if (type == Type::s64) return unary<int64_t, F>;
  return nullptr;
}

Handler binary_handler(const Statement& s, Type type) {
  const std::string& op = s.opcode[0];
  if (op == "add" && type == Type::f32 && s.has("rz")) return add_rz;
  if (op == "mul" && type == Type::f16x2) return multiply_halves;
  if (op == "add") return float_binary_of<Add>(type);
  if (op == "sub") return float_binary_of<Sub>(type);
  if (op == "min") return extreme_of<Min>(s, type);
  if (op == "max") return extreme_of<Max>(s, type);
  if (op == "div") return float_binary_of<Div>(type);
  if (op == "rem") return binary_of<Rem>(type);
  if (op == "mul") {
    if (s.has("wide")) return wide_of(type, false);
    return s.has("hi") ? binary_of<MulHigh>(type) : float_binary_of<Mul>(type);
  }
  return nullptr;
}

Handler ternary_handler(const Statement& s, Type type) {
  if (s.opcode[0] == "fma")
    return type == Type::f32   ? fused_multiply_add<float>
           : type == Type::f64 ? fused_multiply_add<double>
                               : nullptr;
  if (s.opcode[0] != "mad") return nullptr;
  if (s.has("wide")) return wide_of(type, true);
  return s.has("hi") ? multiply_add_of<MulHigh>(type) : multiply_add_of<Mul>(type);
}

Handler unary_handler(const Statement& s, Type type) {
  const std::string& op = s.opcode[0];
  if (op == "neg") return unary_of<Neg>(type, true);
  if (op == "abs") return unary_of<Abs>(type, true);
  if (op == "sqrt") return unary_of<Sqrt>(type, false);
  if (op == "rcp") return unary_of<Rcp>(type, false);
  return nullptr;
}

}  // namespace

bool decode_arithmetic(Decoder& d, const Statement& s, Instruction* in) {
  const Type type = type_at(s);
  if (type == Type::none) return false;
  const Handler two = binary_handler(s, type), three = ternary_handler(s, type);
  const Handler one = unary_handler(s, type);
  in->run = two ? two : three ? three : one;
  if (!in->run) return false;
  // Round to nearest even is the one rounding, and approximations have no exact value.
  const bool extreme = s.opcode[0] == "min" || s.opcode[0] == "max";
  if (extreme)
    check_modifiers(s, {"NaN", "xorsign", "abs"});
  else
    check_modifiers(s, {"rn", "rz", "lo", "hi", "wide"});
  const bool rounds = (type == Type::f32 || type == Type::f64) && s.opcode[0] != "neg" &&
                      s.opcode[0] != "abs" && !extreme;
  const bool zero = in->run == add_rz;
  if ((rounds && !zero && !s.has("rn")) || (s.has("rz") && !zero))
    fail("only .rn is supported, and .rz of add.f32");
  check_operands(s, two ? 3 : three ? 4 : 2);
  const int bytes = size_of(type), result = s.has("wide") ? 2 * bytes : bytes;
  in->to = d.result(s.operands[0], result);
  in->a = d.source(s.operands[1], bytes);
  if (two || three) in->b = d.source(s.operands[2], bytes);
  if (three) in->c = d.source(s.operands[3], result);
  return true;
}

}  // namespace quaver::ptx
