// The loops of simd_activation.h. Sums follow quaver/normalize.h, each of whose lanes is a place in
// the buffer.
#include "simd_activation.h"

#include "quaver/normalize.h"
#include "span.h"

namespace quaver::cpu::QUAVER_ISA {
namespace {

static_assert(kRowLanes == kBlock, "a lane is a place in the buffer");

// Adds the upper half of the lanes to the lower, until one lane is left.
inline float tree_sum(float* lanes) {
  for (int half = kRowLanes / 2; half > 0; half /= 2) {
    QUAVER_SIMD
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

// The values as f32: read in place, or decoded into the buffer.
inline const float* values_of(float* buffer, const void* x, DType type, int64_t n) {
  if (type == DType::f32) return static_cast<const float*>(x);
  load_any(buffer, x, type, n, 1.0f);
  return buffer;
}

float row_sum(const void* x, DType type, int64_t n, float mean, bool squares) {
  alignas(64) float lanes[kRowLanes] = {};
  alignas(64) float buffer[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    const float* v = values_of(buffer, at(x, type, i), type, m);
    if (squares) {
      QUAVER_SIMD
      for (int64_t j = 0; j < m; ++j) lanes[j] += (v[j] - mean) * (v[j] - mean);
    } else {
      QUAVER_SIMD
      for (int64_t j = 0; j < m; ++j) lanes[j] += v[j];
    }
  }
  return tree_sum(lanes);
}

void normalize(float* __restrict out, const void* x, DType type, int64_t n, float mean, float rstd,
               const float* __restrict weight, const float* __restrict bias) {
  load_any(out, x, type, n, 1.0f);
  if (weight != nullptr && bias != nullptr) {
    QUAVER_SIMD
    for (int64_t j = 0; j < n; ++j) out[j] = normalized(out[j], mean, rstd) * weight[j] + bias[j];
  } else if (weight != nullptr) {
    QUAVER_SIMD
    for (int64_t j = 0; j < n; ++j) out[j] = normalized(out[j], mean, rstd) * weight[j];
  } else {
    QUAVER_SIMD
    for (int64_t j = 0; j < n; ++j) out[j] = normalized(out[j], mean, rstd);
    if (bias == nullptr) return;
    QUAVER_SIMD
    for (int64_t j = 0; j < n; ++j) out[j] += bias[j];
  }
}

// Chooses and stores the scale of one group; returns its inverse.
inline float choose_group(uint8_t* scale, uint32_t amax_bits) {
  const uint32_t code = block_exponent(amax_bits);
  *scale = static_cast<uint8_t>(code);
  return block_inverse(code);
}

// Encodes whole groups and perhaps a short last one, at most kBlock values in all. A constant
// `block` gives loops without remainders.
template <class Block>
inline __attribute__((always_inline)) void save_few(e4m3* codes, uint8_t* scale,
                                                    const float* __restrict x, int64_t n,
                                                    Block block) {
  alignas(64) float scaled[kBlock];
  for (int64_t i = 0; i < n; i += block) {
    const int64_t m = n - i < block ? n - i : int64_t{block};
    const float inverse = choose_group(scale + i / block, amax_code<uint32_t>(x + i, m));
    QUAVER_SIMD
    for (int64_t j = 0; j < m; ++j) scaled[i + j] = x[i + j] * inverse;
  }
  store(codes, scaled, n, 1.0f);
}

#if defined(__AVX2__)
// The same of groups of 32 in registers: first all scales, each a long chain of dependent
// operations, then all codes.
inline void save_few(e4m3* codes, uint8_t* scale, const float* __restrict x, int64_t n,
                     std::integral_constant<int64_t, 32> block) {
  constexpr int in_group = 32 / kRegister;  // registers
  const int64_t whole = n - n % kValues;
  alignas(64) float inverse[kBlock / 32];
  for (int64_t i = 0; i < whole; i += 32) {
    Integers most = all(0);
    for (int j = 0; j < in_group; ++j)
      most = larger_bits(most, magnitude_bits(QUAVER_PS(loadu)(x + i + j * kRegister)));
    inverse[i / 32] = choose_group(scale + i / 32, largest_bits(most));
  }
  for (int64_t i = 0; i < whole; i += kValues) {
    Values v = load_values(x + i);
    for (int k = 0; k < kRegisters; ++k)
      v.of[k] = QUAVER_PS(mul)(v.of[k], all(inverse[i / 32 + k / in_group]));
    encode_values(codes + i, v);
  }
  if (whole < n)
    save_few<decltype(block)>(codes + whole, scale + whole / 32, x + whole, n - whole, block);
}
#endif

// Encodes n <= kBlock values in blocks of any size up to kBlock.
inline void save_few(const SavedRow& to, int64_t first, const float* x, int64_t n) {
  e4m3* codes = reinterpret_cast<e4m3*>(to.codes + first);
  uint8_t* scale = to.scale + first / to.block;
  if (to.block == 32)
    save_few(codes, scale, x, n, std::integral_constant<int64_t, 32>{});
  else if (to.block == 16)
    save_few(codes, scale, x, n, std::integral_constant<int64_t, 16>{});
  else
    save_few(codes, scale, x, n, to.block);
}

void save_groups(const SavedRow& to, const void* x, DType type, int64_t n) {
  alignas(64) float buffer[kBlock];
  const int64_t few = kBlock / to.block * to.block;  // 0: a group does not fit
  for (int64_t i = 0; few > 0 && i < n; i += few) {
    const int64_t m = n - i < few ? n - i : few;
    save_few(to, i, values_of(buffer, at(x, type, i), type, m), m);
  }
  for (int64_t first = 0; few == 0 && first < n; first += to.block) {
    const int64_t end = n - first < to.block ? n : first + to.block;
    uint32_t bits = 0;
    for (int64_t i = first; i < end; i += kBlock) {
      const int64_t m = end - i < kBlock ? end - i : kBlock;
      const uint32_t seen = amax_code<uint32_t>(values_of(buffer, at(x, type, i), type, m), m);
      bits = bits < seen ? seen : bits;
    }
    const uint32_t code = block_exponent(bits);
    to.scale[first / to.block] = static_cast<uint8_t>(code);
    for (int64_t i = first; i < end; i += kBlock) {
      const int64_t m = end - i < kBlock ? end - i : kBlock;
      store(reinterpret_cast<e4m3*>(to.codes + i), values_of(buffer, at(x, type, i), type, m), m,
            block_inverse(code));
    }
  }
}

// Decodes the columns of a row from `first` on.
void load_groups(float* __restrict out, const GroupedRow& row, int64_t first, int64_t n) {
  const auto* codes = reinterpret_cast<const e4m3*>(row.codes + first);
  int64_t i = 0;
#if defined(__AVX2__)
  // The usual groups, in registers and without divisions.
  for (; row.block == 32 && first % 32 == 0 && i + kValues <= n; i += kValues) {
    const uint8_t* scale = row.scale + (first + i) / 32;
    Values v;
    for (int k = 0; k < kRegisters; k += 2)
      halves_to_floats(v.of + k, halves_of(e4m3{}, widen(codes + i + k * kRegister)),
                       kHalvesFactor<e4m3>);
    for (int k = 0; k < kRegisters; ++k) {
      v.of[k] = QUAVER_PS(mul)(v.of[k], all(decode_e8m0(scale[k * kRegister / 32])));
      QUAVER_PS(storeu)(out + i + k * kRegister, v.of[k]);
    }
  }
#endif
  while (i < n) {
    const int64_t group = (first + i) / row.block;
    const int64_t left = (group + 1) * row.block - (first + i);
    const int64_t m = n - i < left ? n - i : left;
    load(out + i, codes + i, m, decode_e8m0(row.scale[group]));
    i += m;
  }
}

// Computes dy, g = dy * weight and xhat of m columns from i on.
inline void load_gradient(float* __restrict dy, float* __restrict g, float* __restrict xhat,
                          const NormalizeRow& row, int64_t i, int64_t m) {
  load_any(dy, at(row.dy, row.dy_type, i), row.dy_type, m, 1.0f);
  load_groups(xhat, row.x, i, m);
  const float mean = row.mean, rstd = row.rstd;
  QUAVER_SIMD
  for (int64_t j = 0; j < m; ++j) xhat[j] = normalized(xhat[j], mean, rstd);
  if (row.weight != nullptr) {
    const float* __restrict w = row.weight + i;
    QUAVER_SIMD
    for (int64_t j = 0; j < m; ++j) g[j] = dy[j] * w[j];
  } else {
    memcpy(g, dy, static_cast<size_t>(m) * sizeof(float));
  }
}

void normalize_backward(const NormalizeRow& row, int64_t n) {
  alignas(64) float dy[kBlock], g[kBlock], xhat[kBlock];
  alignas(64) float lanes_g[kRowLanes] = {}, lanes_g_xhat[kRowLanes] = {};
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    load_gradient(dy, g, xhat, row, i, m);
    QUAVER_SIMD
    for (int64_t j = 0; j < m; ++j) lanes_g_xhat[j] += g[j] * xhat[j];
    if (row.centered) {
      QUAVER_SIMD
      for (int64_t j = 0; j < m; ++j) lanes_g[j] += g[j];
    }
    if (float* __restrict dweight = row.dweight) {
      QUAVER_SIMD
      for (int64_t j = 0; j < m; ++j) dweight[i + j] += dy[j] * xhat[j];
    }
    if (float* __restrict dbias = row.dbias) {
      QUAVER_SIMD
      for (int64_t j = 0; j < m; ++j) dbias[i + j] += dy[j];
    }
  }
  const float count = static_cast<float>(n);
  const NormalizeGradient sums = {row.centered ? tree_sum(lanes_g) / count : 0.0f,
                                  tree_sum(lanes_g_xhat) / count};
  const float rstd = row.rstd;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    if (n > kBlock) load_gradient(dy, g, xhat, row, i, m);
    QUAVER_SIMD
    for (int64_t j = 0; j < m; ++j) g[j] = normalize_gradient(g[j], xhat[j], sums, rstd);
    store_any(at(row.dx, row.dx_type, i), row.dx_type, g, m, 1.0f);
  }
}

// Calls body(kind) with the kind as a constant.
template <class Body>
inline __attribute__((always_inline)) void with_kind(Activation kind, Body body) {
  switch (kind) {
    case Activation::silu: return body(std::integral_constant<Activation, Activation::silu>{});
    case Activation::gelu: return body(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return body(std::integral_constant<Activation, Activation::gelu_tanh>{});
  }
}

void activate(float* __restrict out, const void* x, const void* up, DType type, int64_t n,
              Activation kind, const SavedRow& x_saved, const SavedRow& up_saved) {
  alignas(64) float buffer[kBlock];
  const float* __restrict v = values_of(buffer, x, type, n);
  if (x_saved.codes != nullptr) save_few(x_saved, 0, v, n);
  with_kind(kind, [&](auto k) {
    QUAVER_SIMD
    for (int64_t j = 0; j < n; ++j) out[j] = quaver::activate<decltype(k)::value>(v[j]);
  });
  if (up == nullptr) return;
  const float* __restrict u = values_of(buffer, up, type, n);
  if (up_saved.codes != nullptr) save_few(up_saved, 0, u, n);
  QUAVER_SIMD
  for (int64_t j = 0; j < n; ++j) out[j] *= u[j];
}

void scale_channels(float* __restrict v, uint32_t* __restrict amax_bits,
                    const float* __restrict scale, int64_t n) {
  QUAVER_SIMD
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t seen = bit_cast<uint32_t>(v[j]) & 0x7fffffffu;
    amax_bits[j] = amax_bits[j] < seen ? seen : amax_bits[j];
    v[j] *= scale[j];
  }
}

void activate_backward(float* __restrict dx, float* __restrict dup, const void* dy, DType dy_type,
                       const GroupedRow& x, const GroupedRow& up, const float* channel_scale,
                       int64_t first, int64_t n, Activation kind) {
  alignas(64) float xs[kBlock], us[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    float* __restrict g = dx + i;
    load_any(g, at(dy, dy_type, first + i), dy_type, m, 1.0f);
    if (channel_scale != nullptr) {
      const float* scale = channel_scale + first + i;
      QUAVER_SIMD
      for (int64_t j = 0; j < m; ++j) g[j] *= scale[j];
    }
    load_groups(xs, x, first + i, m);
    if (up.codes != nullptr) load_groups(us, up, first + i, m);
    with_kind(kind, [&](auto k) {
      constexpr Activation f = decltype(k)::value;
      if (up.codes == nullptr) {
        QUAVER_SIMD
        for (int64_t j = 0; j < m; ++j) g[j] *= activation_slope<f>(xs[j]);
        return;
      }
      float* __restrict du = dup + i;
      QUAVER_SIMD
      for (int64_t j = 0; j < m; ++j) {
        const Gradients d = activation_gradients<f>(g[j], xs[j], us[j]);
        g[j] = d.x;
        du[j] = d.up;
      }
    });
  }
}

}  // namespace

extern const ActivationSimd activation_table;
const ActivationSimd activation_table = {row_sum,  normalize,      normalize_backward, save_groups,
                                         activate, scale_channels, activate_backward};

}  // namespace quaver::cpu::QUAVER_ISA
