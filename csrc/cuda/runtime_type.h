// Vectors whose storage type is a run-time value, for the kernels that take whole lists of tensors
// in one launch. They decode and encode four elements at a time, which needs few registers. The
// branches on the type are uniform.
#pragma once

#include "vector.h"

namespace quaver::cuda {

constexpr int kMaxSize = 4;
constexpr int kQuad = 4;
constexpr int kQuads = kVector / kQuad;
using AnyPacked = Packed<kMaxSize>;

QUAVER_DEVICE AnyPacked load_any(const void* p, DType type, int64_t i, int64_t n, bool aligned) {
  const int64_t size = size_of(type);
  return load<kMaxSize>(static_cast<const char*>(p) + i * size, static_cast<int>(size), n, aligned);
}

// Four elements, in one access of 4 to 16 bytes where they are whole and aligned. `whole` says that
// all four are inside or outside, so that single elements need no code.
using AnyQuad = Packed<1>;

QUAVER_DEVICE AnyQuad load_quad(const void* p, DType type, int64_t i, int64_t n, bool aligned,
                                bool whole = false) {
  AnyQuad v = {};
  if (whole && n <= 0) return v;
  const void* from = static_cast<const char*>(p) + i * size_of(type);
  if (!whole && (!aligned || n < kQuad)) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      if (k >= n) continue;
      if (size_of(type) == 4)
        v.word[k] = static_cast<const uint32_t*>(from)[k];
      else if (size_of(type) == 2)
        v.word[k / 2] |= uint32_t(static_cast<const uint16_t*>(from)[k]) << k % 2 * 16;
      else
        v.word[0] |= uint32_t(static_cast<const uint8_t*>(from)[k]) << k * 8;
    }
  } else if (size_of(type) == 4) {
    const uint4 w = *static_cast<const uint4*>(from);
    v = {{w.x, w.y, w.z, w.w}};
  } else if (size_of(type) == 2) {
    const uint2 w = *static_cast<const uint2*>(from);
    v = {{w.x, w.y}};
  } else {
    v.word[0] = *static_cast<const uint32_t*>(from);
  }
  return v;
}

QUAVER_DEVICE void store_quad(void* p, DType type, int64_t i, const AnyQuad& v, int64_t n,
                              bool aligned, bool whole = false) {
  if (whole && n <= 0) return;
  void* to = static_cast<char*>(p) + i * size_of(type);
  if (!whole && (!aligned || n < kQuad)) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      if (k >= n) continue;
      if (size_of(type) == 4)
        static_cast<uint32_t*>(to)[k] = v.word[k];
      else if (size_of(type) == 2)
        static_cast<uint16_t*>(to)[k] = static_cast<uint16_t>(v.word[k / 2] >> k % 2 * 16);
      else
        static_cast<uint8_t*>(to)[k] = static_cast<uint8_t>(v.word[0] >> k * 8);
    }
  } else if (size_of(type) == 4) {
    *static_cast<uint4*>(to) = uint4{v.word[0], v.word[1], v.word[2], v.word[3]};
  } else if (size_of(type) == 2) {
    *static_cast<uint2*>(to) = uint2{v.word[0], v.word[1]};
  } else {
    *static_cast<uint32_t*>(to) = v.word[0];
  }
}

template <class T, int kSize>
QUAVER_DEVICE void decode_quad(const Packed<kSize>& v, int quad, float (&x)[kQuad]) {
#pragma unroll
  for (int w = 0; w < int(sizeof(T)); ++w)
    decode_word(T{}, v.word[quad * int(sizeof(T)) + w], x + w * kQuad / int(sizeof(T)));
}

template <class T, int kSize>
QUAVER_DEVICE void encode_quad(const float (&x)[kQuad], int quad, Packed<kSize>& v) {
#pragma unroll
  for (int w = 0; w < int(sizeof(T)); ++w)
    v.word[quad * int(sizeof(T)) + w] = convert_word<T>(x + w * kQuad / int(sizeof(T)));
}

// x = decode(values 4 * quad.. of v) * scale
template <int kSize>
QUAVER_DEVICE void decode_any(DType type, const Packed<kSize>& v, int quad, float scale,
                              float (&x)[kQuad]) {
  switch (type) {
    case DType::f32: decode_quad<float>(v, quad, x); break;
    case DType::f16: decode_quad<f16>(v, quad, x); break;
    case DType::bf16: decode_quad<bf16>(v, quad, x); break;
    case DType::e4m3: decode_quad<e4m3>(v, quad, x); break;
    case DType::e5m2: decode_quad<e5m2>(v, quad, x); break;
  }
#pragma unroll
  for (int k = 0; k < kQuad; ++k) x[k] *= scale;
}

// values 4 * quad.. of v = encode(x * inverse_scale), nearest
template <int kSize>
QUAVER_DEVICE void encode_any(DType type, const float (&x)[kQuad], float inverse_scale, int quad,
                              Packed<kSize>& v) {
  float scaled[kQuad];
#pragma unroll
  for (int k = 0; k < kQuad; ++k) scaled[k] = x[k] * inverse_scale;
  switch (type) {
    case DType::f32: encode_quad<float>(scaled, quad, v); break;
    case DType::f16: encode_quad<f16>(scaled, quad, v); break;
    case DType::bf16: encode_quad<bf16>(scaled, quad, v); break;
    case DType::e4m3: encode_quad<e4m3>(scaled, quad, v); break;
    case DType::e5m2: encode_quad<e5m2>(scaled, quad, v); break;
  }
}

}  // namespace quaver::cuda
