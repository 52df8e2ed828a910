// cvt: integers and floats of every width, f16, bf16 and FP8 in pairs.
#include <cmath>
#include <limits>
#include <type_traits>

#include "decode.h"
#include "formats.h"
#include "quaver/check.h"

namespace quaver::ptx {

namespace {

// A register may be wider than the type that it holds.
template <class T>
T read(const Warp& w, const Slot& s, int lane) {
  T value;
  std::memcpy(&value, w.at<unsigned char>(s) + lane * s.size, sizeof(T));
  return value;
}

// What is above the type is filled by its sign, or by zeros.
template <class T>
void write(const Warp& w, const Slot& s, int lane, T value) {
  using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
  uint64_t bits = 0;
  if constexpr (std::is_integral_v<T>) {
    const Wide wide = value;
    std::memcpy(&bits, &wide, sizeof(bits));
  } else {
    std::memcpy(&bits, &value, sizeof(value));
  }
  std::memcpy(w.at<unsigned char>(s) + lane * s.size, &bits, s.size);
}

enum class Round { none, nearest, zero, up, down };

template <Round round>
double rounded(double x) {
  switch (round) {
    case Round::nearest: return std::nearbyint(x);
    case Round::zero: return std::trunc(x);
    case Round::up: return std::ceil(x);
    default: return std::floor(x);
  }
}

// Floats become integers saturated, NaN becomes 0.
template <class To, class From, Round round>
void convert(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    const From x = read<From>(w, in.a, i);
    if constexpr (std::is_floating_point_v<From> && std::is_integral_v<To>) {
      const double r = rounded<round>(x);
      constexpr double low = static_cast<double>(std::numeric_limits<To>::min());
      constexpr double high = static_cast<double>(std::numeric_limits<To>::max());
      To result = 0;
      if (r >= high)
        result = std::numeric_limits<To>::max();
      else if (r <= low)
        result = std::numeric_limits<To>::min();
      else if (r == r)
        result = static_cast<To>(r);
      write<To>(w, in.to, i, result);
    } else {
      write<To>(w, in.to, i, static_cast<To>(x));
    }
  });
}

template <class To, Round round>
Handler from(Type type) {
  switch (type) {
    case Type::u8: return convert<To, uint8_t, round>;
    case Type::s8: return convert<To, int8_t, round>;
    case Type::u16: return convert<To, uint16_t, round>;
    case Type::s16: return convert<To, int16_t, round>;
    case Type::u32: return convert<To, uint32_t, round>;
    case Type::s32: return convert<To, int32_t, round>;
    case Type::u64: return convert<To, uint64_t, round>;
    case Type::s64: return convert<To, int64_t, round>;
    case Type::f32: return convert<To, float, round>;
    case Type::f64: return convert<To, double, round>;
    default: return nullptr;
  }
}

template <Round round>
Handler between(Type to, Type type) {
  switch (to) {
    case Type::u8: return from<uint8_t, round>(type);
    case Type::s8: return from<int8_t, round>(type);
    case Type::u16: return from<uint16_t, round>(type);
    case Type::s16: return from<int16_t, round>(type);
    case Type::u32: return from<uint32_t, round>(type);
    case Type::s32: return from<int32_t, round>(type);
    case Type::u64: return from<uint64_t, round>(type);
    case Type::s64: return from<int64_t, round>(type);
    case Type::f32: return from<float, round>(type);
    case Type::f64: return from<double, round>(type);
    default: return nullptr;
  }
}

template <bool nearest, bool saturates>
void to_f16(Warp& w, const Instruction& in, uint32_t lanes) {
  const float* a = w.at<float>(in.a);
  uint16_t* to = w.at<uint16_t>(in.to);
  for_lanes(lanes,
            [=](int i) { to[i] = static_cast<uint16_t>(encode(a[i], kF16, nearest, saturates)); });
}

void from_f16(Warp& w, const Instruction& in, uint32_t lanes) {
  const uint16_t* a = w.at<uint16_t>(in.a);
  float* to = w.at<float>(in.to);
  for_lanes(lanes, [=](int i) { to[i] = decode(a[i], kF16); });
}

// Two f32 into one register: the first operand becomes the upper half.
template <const Format* format, bool nearest, bool saturates, class To>
void to_pair(Warp& w, const Instruction& in, uint32_t lanes) {
  const float *a = w.at<float>(in.a), *b = w.at<float>(in.b);
  To* to = w.at<To>(in.to);
  for_lanes(lanes, [=](int i) {
    const uint32_t high = encode(a[i], *format, nearest, saturates);
    to[i] = static_cast<To>(high << 4 * sizeof(To) | encode(b[i], *format, nearest, saturates));
  });
}

template <bool nearest>
void to_bf16_pair(Warp& w, const Instruction& in, uint32_t lanes) {
  const float *a = w.at<float>(in.a), *b = w.at<float>(in.b);
  uint32_t* to = w.at<uint32_t>(in.to);
  for_lanes(lanes,
            [=](int i) { to[i] = encode_bf16(a[i], nearest) << 16 | encode_bf16(b[i], nearest); });
}

template <const Format* format>
void from_fp8_pair(Warp& w, const Instruction& in, uint32_t lanes) {
  const uint16_t* a = w.at<uint16_t>(in.a);
  uint32_t* to = w.at<uint32_t>(in.to);
  for_lanes(lanes, [=](int i) {
    const uint32_t high = encode(decode(a[i] >> 8, *format), kF16, true, false);
    to[i] = high << 16 | encode(decode(a[i] & 0xff, *format), kF16, true, false);
  });
}

// Two f16 in one register to FP8, lower to lower.
template <const Format* format>
void halves_to_fp8(Warp& w, const Instruction& in, uint32_t lanes) {
  const uint32_t* a = w.at<uint32_t>(in.a);
  uint16_t* to = w.at<uint16_t>(in.to);
  for_lanes(lanes, [=](int i) {
    const uint32_t high = encode(decode(a[i] >> 16, kF16), *format, true, true);
    to[i] =
        static_cast<uint16_t>(high << 8 | encode(decode(a[i] & 0xffff, kF16), *format, true, true));
  });
}

Handler pair_handler(const Statement& s, Type to, Type type) {
  const bool sat = s.has("satfinite"), rn = s.has("rn");
  if (!rn && !s.has("rz")) return nullptr;
  if (type == Type::e4m3x2 && to == Type::f16x2) return from_fp8_pair<&kE4M3>;
  if (type == Type::e5m2x2 && to == Type::f16x2) return from_fp8_pair<&kE5M2>;
  if (type == Type::f16x2 && sat && rn) {
    if (to == Type::e4m3x2) return halves_to_fp8<&kE4M3>;
    if (to == Type::e5m2x2) return halves_to_fp8<&kE5M2>;
  }
  if (type != Type::f32) return nullptr;
  if (to == Type::f16x2)
    return sat  ? rn ? to_pair<&kF16, true, true, uint32_t> : to_pair<&kF16, false, true, uint32_t>
            : rn ? to_pair<&kF16, true, false, uint32_t>
                : to_pair<&kF16, false, false, uint32_t>;
  if (to == Type::bf16x2 && !sat) return rn ? to_bf16_pair<true> : to_bf16_pair<false>;
  if (!sat || !rn) return nullptr;
  if (to == Type::e4m3x2) return to_pair<&kE4M3, true, true, uint16_t>;
  if (to == Type::e5m2x2) return to_pair<&kE5M2, true, true, uint16_t>;
  return nullptr;
}

bool is_float(Type t) { return t == Type::f32 || t == Type::f64; }

Handler scalar_handler(const Statement& s, Type to, Type type) {
  if (to == Type::f32 && type == Type::f16) return from_f16;
  if (to == Type::f16 && type == Type::f32) {
    if (!s.has("rn") && !s.has("rz")) return nullptr;
    const bool sat = s.has("satfinite");
    if (s.has("rn")) return sat ? to_f16<true, true> : to_f16<true, false>;
    return sat ? to_f16<false, true> : to_f16<false, false>;
  }
  if (s.has("satfinite")) return nullptr;
  if (is_float(type) && !is_float(to)) {
    if (s.has("rni")) return between<Round::nearest>(to, type);
    if (s.has("rzi")) return between<Round::zero>(to, type);
    if (s.has("rpi")) return between<Round::up>(to, type);
    return s.has("rmi") ? between<Round::down>(to, type) : nullptr;
  }
  // What rounds says so; the host rounds to nearest as .rn does.
  const bool rounds = is_float(to) && !(to == Type::f64 && type == Type::f32);
  if (rounds != s.has("rn") || s.has("rz")) return nullptr;
  return between<Round::none>(to, type);
}

}  // namespace

bool decode_convert(Decoder& d, const Statement& s, Instruction* in) {
  if (s.opcode[0] != "cvt") return false;
  const Type to = type_at(s, 0), type = type_at(s, 1);
  if (to == Type::none || type == Type::none) return false;
  check_modifiers(s, {"rn", "rz", "rni", "rzi", "rpi", "rmi", "satfinite"});
  const bool pair =
      to == Type::f16x2 || to == Type::bf16x2 || to == Type::e4m3x2 || to == Type::e5m2x2;
  in->run = pair ? pair_handler(s, to, type) : scalar_handler(s, to, type);
  if (!in->run) return false;
  const bool two = pair && type == Type::f32;
  check_operands(s, two ? 3 : 2);
  const bool exact = pair || to == Type::f16 || type == Type::f16;
  in->to = exact ? d.result(s.operands[0], size_of(to)) : d.wide_result(s.operands[0], size_of(to));
  in->a =
      exact ? d.source(s.operands[1], size_of(type)) : d.wide_source(s.operands[1], size_of(type));
  if (two) in->b = d.source(s.operands[2], 4);
  return true;
}

}  // namespace quaver::ptx
