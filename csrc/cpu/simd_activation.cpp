// The loops of simd_activation.h. Sums follow quaver/normalize.h, each of whose lanes is a place in
// the buffer.
#include "simd_activation.h"

#include <algorithm>

#include "quaver/normalize.h"
#include "saved_groups.h"

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

#if defined(__AVX2__)
// Sums whole rows of kRowLanes values, or the squares of their distances from the mean, in their
// lanes, a few lanes at a time through all rows: their sums stay in registers. Prefetches as many
// rows behind them in order, for the call that follows.
template <bool kSquares, class T>
inline void sum_rows(float* lanes, const T* x, int64_t rows, float mean) {
  constexpr int64_t few = 2 * kValues;
  for (int64_t first = 0; first < kRowLanes; first += few) {
    Floats sum[2] = {{}, {}};
    for (int64_t r = 0; r < rows; ++r) {
      const T* next = x + rows * kRowLanes + first * rows + r * few;
      for (int64_t k = 0; k < few; k += 64 / int64_t(sizeof(T))) __builtin_prefetch(next + k);
      for (int h = 0; h < 2; ++h) {
        const Floats v = load_values(x + r * kRowLanes + first + h * kValues);
        const Floats d = kSquares ? v - quaver::cpu::QUAVER_ISA::lanes(mean) : v;
        sum[h] = sum[h] + (kSquares ? d * d : d);
      }
    }
    for (int h = 0; h < 2; ++h) store_lanes(lanes + first + h * kValues, sum[h]);
  }
}
#endif

template <bool kSquares>
float row_sum(const void* x, DType type, int64_t n, float mean) {
  alignas(64) float lanes[kRowLanes], buffer[kBlock];
  int64_t i = 0;
#if defined(__AVX2__)
  with_type(type, x, [&](auto* p) { sum_rows<kSquares>(lanes, p, n / kRowLanes, mean); });
  i = n - n % kRowLanes;
#else
  std::fill_n(lanes, kRowLanes, 0.0f);
#endif
  for (; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    const float* v = values_of(buffer, at(x, type, i), type, m);
    QUAVER_SIMD
    for (int64_t j = 0; j < m; ++j) {
      const float d = kSquares ? v[j] - mean : v[j];
      lanes[j] += kSquares ? d * d : d;
    }
  }
  return tree_sum(lanes);
}

float row_sum(const void* x, DType type, int64_t n, float mean, bool squares) {
  return squares ? row_sum<true>(x, type, n, mean) : row_sum<false>(x, type, n, mean);
}

#if defined(__AVX2__)
// Normalizes whole registers; returns how many values those are.
template <class T>
inline int64_t normalize_registers(float* out, const T* x, int64_t n, float mean, float rstd,
                                   const float* weight, const float* bias) {
  int64_t i = 0;
  for (; i + kValues <= n; i += kValues) {
    Floats y = (load_values(x + i) - lanes(mean)) * lanes(rstd);
    if (weight != nullptr) y = y * load_values(weight + i);
    if (bias != nullptr) y = y + load_values(bias + i);
    store_lanes(out + i, y);
  }
  return i;
}
#endif

void normalize(float* __restrict out, const void* x, DType type, int64_t n, float mean, float rstd,
               const float* __restrict weight, const float* __restrict bias) {
  int64_t i = 0;
#if defined(__AVX2__)
  with_type(type, x,
            [&](auto* p) { i = normalize_registers(out, p, n, mean, rstd, weight, bias); });
#endif
  load_any(out + i, at(x, type, i), type, n - i, 1.0f);
  for (; i < n; ++i) {
    out[i] = normalized(out[i], mean, rstd);
    if (weight != nullptr) out[i] *= weight[i];
    if (bias != nullptr) out[i] += bias[i];
  }
}

void save_groups(const SavedRow& to, const void* x, DType type, int64_t n) {
  alignas(64) float buffer[kBlock];
  const int64_t few = kBlock / to.block * to.block;  // 0: a group does not fit
  for (int64_t i = 0; few > 0 && i < n; i += few) {
    const int64_t m = n - i < few ? n - i : few;
    const int64_t done = i + save_stored(to, i, at(x, type, i), type, m), left = i + m - done;
    if (left > 0) save_few(to, done, values_of(buffer, at(x, type, done), type, left), left);
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

// What a row's sums are added up in, for the columns of a block.
struct RowSums {
  alignas(64) float g[kRowLanes] = {}, g_xhat[kRowLanes] = {};
};

#if defined(__AVX2__)
QUAVER_INLINE void add_to(float* sums, const Floats& x) {
  store_lanes(sums, load_values(sums) + x);
}

// load_gradient and its sums, of whole registers in groups of 32; returns how many columns those
// are.
template <class T>
inline int64_t sum_registers(RowSums* sums, float* g, float* xhat, const NormalizeRow& row,
                             const T* dy, int64_t i, int64_t m) {
  const auto* codes = reinterpret_cast<const e4m3*>(row.x.codes);
  int64_t j = 0;
  for (; row.x.block == 32 && j + kValues <= m; j += kValues) {
    const int64_t col = i + j;
    const Floats of_dy = load_values(dy + col);
    const Floats of_xhat =
        (load_groups(codes + col, row.x.scale + col / 32) - lanes(row.mean)) * lanes(row.rstd);
    const Floats of_g = row.weight != nullptr ? of_dy * load_values(row.weight + col) : of_dy;
    store_lanes(g + j, of_g);
    store_lanes(xhat + j, of_xhat);
    add_to(sums->g_xhat + j, of_g * of_xhat);
    if (row.centered) add_to(sums->g + j, of_g);
    if (row.dweight != nullptr) add_to(row.dweight + col, of_dy * of_xhat);
    if (row.dbias != nullptr) add_to(row.dbias + col, of_dy);
  }
  return j;
}
#endif

// Computes g and xhat of m columns from i on, and adds to their sums.
inline void sum_gradient(RowSums* sums, float* __restrict g, float* __restrict xhat,
                         const NormalizeRow& row, int64_t i, int64_t m) {
  alignas(64) float dy[kBlock];
  int64_t done = 0;
  prefetch_next(at(row.dy, row.dy_type, i), m * size_of(row.dy_type));
  prefetch_next(row.x.codes + i, m);
#if defined(__AVX2__)
  with_type(row.dy_type, row.dy,
            [&](auto* p) { done = sum_registers(sums, g, xhat, row, p, i, m); });
#endif
  if (done == m) return;
  load_gradient(dy + done, g + done, xhat + done, row, i + done, m - done);
  auto add = [&](float* __restrict to, auto value) {
    QUAVER_SIMD
    for (int64_t j = done; j < m; ++j) to[j] += value(j);
  };
  add(sums->g_xhat, [&](int64_t j) { return g[j] * xhat[j]; });
  if (row.centered) add(sums->g, [&](int64_t j) { return g[j]; });
  if (row.dweight != nullptr) add(row.dweight + i, [&](int64_t j) { return dy[j] * xhat[j]; });
  if (row.dbias != nullptr) add(row.dbias + i, [&](int64_t j) { return dy[j]; });
}

void normalize_backward(const NormalizeRow& row, int64_t n) {
  constexpr int64_t most = 16 * kBlock;  // of a row that is decoded once
  alignas(64) float dy[kBlock], kept_g[most], kept_xhat[most];
  const int64_t stride = n <= most ? 1 : 0;
  RowSums lanes;
  for (int64_t i = 0; i < n; i += kBlock)
    sum_gradient(&lanes, kept_g + stride * i, kept_xhat + stride * i, row, i,
                 n - i < kBlock ? n - i : kBlock);
  const float count = static_cast<float>(n);
  const NormalizeGradient sums = {row.centered ? tree_sum(lanes.g) / count : 0.0f,
                                  tree_sum(lanes.g_xhat) / count};
  const float rstd = row.rstd;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    float* __restrict g = kept_g + stride * i, * __restrict xhat = kept_xhat + stride * i;
    if (stride == 0) load_gradient(dy, g, xhat, row, i, m);
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

// out = f(x) * up, or f(x) without `up`.
template <Activation kind, class T>
inline void activate_values(float* __restrict out, const T* __restrict x, const T* __restrict up,
                            int64_t n) {
  if (up == nullptr) {
    QUAVER_SIMD
    for (int64_t j = 0; j < n; ++j) out[j] = quaver::activate<kind>(decode(x[j]));
    return;
  }
  QUAVER_SIMD
  for (int64_t j = 0; j < n; ++j) out[j] = quaver::activate<kind>(decode(x[j])) * decode(up[j]);
}

void activate(float* __restrict out, const void* x, const void* up, DType type, int64_t n,
              Activation kind, const SavedRow& x_saved, const SavedRow& up_saved) {
  alignas(64) float buffer[2][kBlock];
  auto save = [&](const SavedRow& to, const void* from) {
    if (to.codes == nullptr) return;
    const int64_t done = save_stored(to, 0, from, type, n);
    if (done < n)
      save_few(to, done, values_of(buffer[0], at(from, type, done), type, n - done), n - done);
  };
  prefetch_next(x, n * size_of(type));
  save(x_saved, x);
  if (up != nullptr) {
    prefetch_next(up, n * size_of(type));
    save(up_saved, up);
  }
  with_kind(kind, [&](auto k) {
    constexpr Activation f = decltype(k)::value;
    if (type == DType::bf16)
      return activate_values<f>(out, static_cast<const bf16*>(x), static_cast<const bf16*>(up), n);
    const float* ups = up == nullptr ? nullptr : values_of(buffer[1], up, type, n);
    activate_values<f>(out, values_of(buffer[0], x, type, n), ups, n);
  });
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
    prefetch_next(at(dy, dy_type, first + i), m * size_of(dy_type));
    prefetch_next(x.codes + first + i, m);
    if (up.codes != nullptr) prefetch_next(up.codes + first + i, m);
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
