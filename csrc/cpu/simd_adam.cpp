// Adam and the grouped states, compiled once per instruction set as simd.cpp is. The loops
// process runs of one group through f32 buffers in the first-level cache: a run is decoded, updated
// and encoded, and only the conversions depend on the storage types.
#include "simd_adam.h"

#include <algorithm>

#include "weight_span.h"
#if defined(__AVX2__)
#include "scaled_adam.h"
#endif

// gcc 12 warns of undefined behaviour in remainder loops, which whole runs never enter.
#pragma GCC diagnostic ignored "-Waggressive-loop-optimizations"

namespace quaver::cpu::QUAVER_ISA {
namespace {

// The length of a run: small enough that the processor overlaps the division and square root of one
// run with the conversions of the next.
constexpr int64_t kRun = kGroup;

// Calls body(T{}) for a type that has a Format.
template <class Body>
inline __attribute__((always_inline)) void with_format(DType type, Body body) {
  switch (type) {
    case DType::e4m3: return body(e4m3{});
    case DType::e5m2: return body(e5m2{});
    default: return body(f16{});
  }
}

template <class Body>
inline __attribute__((always_inline)) void with_fp8(DType type, Body body) {
  type == DType::e4m3 ? body(e4m3{}) : body(e5m2{});
}

// Whole runs get loops of a constant count, which have no remainders; count <= kRun.
template <class Body>
inline __attribute__((always_inline)) void with_count(int64_t count, Body body) {
  if (count == kRun) return body(kRun);
  body(count < kRun ? count : kRun);
}

bool is_plain(const StateSpan& s) { return s.type == DType::f32 && s.scaling == Scaling::tensor; }

// Decodes elements i and the following of a state.
void load_state(float* out, const StateSpan& s, int64_t i, int64_t count) {
  if (s.scaling == Scaling::expand) {
    const float scale = s.scales[i / kGroup];
    const auto* codes = static_cast<const uint8_t*>(s.values) + i;
    const float* values = expanded_values(s.type, bit_cast<uint32_t>(scale) & kPowerMask);
    alignas(64) uint32_t bits[kRun];
    for (int64_t j = 0; j < count; ++j) bits[j] = bit_cast<uint32_t>(values[codes[j]]);
    QUAVER_SIMD
    for (int64_t j = 0; j < count; ++j) out[j] = bit_cast<float>(bits[j]) * scale;
    return;
  }
  const float scale = s.scaling == Scaling::group ? s.scales[i / kGroup] : s.scale;
  with_count(count, [&](int64_t n) { load_any(out, at(s.values, s.type, i), s.type, n, scale); });
}

GroupRange range_of(const float* x, int64_t n) {
  uint32_t most = 0, least = 0xffffffffu;
  _Pragma("omp simd reduction(max : most) reduction(min : least)") for (int64_t j = 0; j < n; ++j) {
    const uint32_t bits = range_bits(x[j]);
    most = most < bits ? bits : most;
    least = bits - 1u < least ? bits - 1u : least;
  }
  return {most, least};
}

// Chooses and stores the scale of the group that begins at i.
void choose_scale(const StateSpan& s, int64_t i, GroupRange range) {
  const bool expands = s.scaling == Scaling::expand;
  s.scales[i / kGroup] =
      s.type == DType::e4m3 ? group_scale<e4m3>(expands, range) : group_scale<e5m2>(expands, range);
}

// Computes y, the values x in the format's domain, which are then rounded to codes.
template <class T>
inline void to_format(float* __restrict y, const float* __restrict x, const StateSpan& s, int64_t i,
                      int64_t n) {
  if (s.scaling == Scaling::tensor) {
    const float inverse = 1.0f / s.new_scale;
    QUAVER_SIMD
    for (int64_t j = 0; j < n; ++j) y[j] = x[j] * inverse;
    return;
  }
  if constexpr (sizeof(T) == 1) {
    const float scale = s.scales[i / kGroup];
    if (s.scaling == Scaling::expand) {
      const Expander e = expander<T>(scale);
      QUAVER_SIMD
      for (int64_t j = 0; j < n; ++j) y[j] = log2_expanded(e, x[j]);
      QUAVER_SIMD
      for (int64_t j = 0; j < n; ++j) y[j] = expanded(y[j], x[j]);
    } else {
      QUAVER_SIMD
      for (int64_t j = 0; j < n; ++j) y[j] = x[j] / scale;
    }
  }
}

void store_plain(const StateSpan& s, int64_t i, const float* x, int64_t count) {
  with_count(count, [&](int64_t n) {
    store_any(at(s.values, s.type, i), s.type, x, n, 1.0f / s.new_scale);
  });
}

// `starts` is null for nearest rounding.
void store_exp_avg(const StateSpan& s, int64_t i, const float* x, const float* grad,
                   const Dither& dither, const uint32_t* starts, int64_t count) {
  if (is_plain(s)) return;  // updated where it lies
  if (s.type == DType::bf16) return store_plain(s, i, x, count);
  alignas(64) float y[kRun];
  with_count(count, [&](int64_t n) {
    with_format(s.type, [&](auto format) {
      using T = decltype(format);
      to_format<T>(y, x, s, i, n);
#if defined(__AVX2__)
      if constexpr (sizeof(T) == 1) {
        auto* codes = static_cast<T*>(s.values) + i;
        if (starts == nullptr && n % kValues == 0) return settle_codes(codes, y, x, grad, n);
      }
#endif
      if (starts == nullptr) {
        QUAVER_SIMD
        for (int64_t j = 0; j < n; ++j) y[j] = settle_exp_avg<T>(y[j], x[j], grad[j], false, 0);
      } else {
        QUAVER_SIMD
        for (int64_t j = 0; j < n; ++j)
          y[j] = settle_exp_avg<T>(y[j], x[j], grad[j], true, exp_avg_noise(dither, starts[j]));
      }
      store(static_cast<T*>(s.values) + i, y, n, 1.0f);
    });
  });
}

void store_exp_avg_sq(const StateSpan& s, int64_t i, const float* x, int64_t count) {
  if (is_plain(s)) return;
  if (!is_fp8(s.type)) return store_plain(s, i, x, count);
  alignas(64) float y[kRun];
  with_count(count, [&](int64_t n) {
    with_format(s.type, [&](auto format) {
      using T = decltype(format);
      if constexpr (sizeof(T) == 1) {
        to_format<T>(y, x, s, i, n);
        QUAVER_SIMD
        for (int64_t j = 0; j < n; ++j) y[j] = keep_nonzero<T>(y[j], x[j]);
        store(static_cast<T*>(s.values) + i, y, n, 1.0f);
      }
    });
  });
}

// Encodes and stores the moments of a run.
void store_moments(const AdamSpan& p, int64_t i, const float* m, const float* v, const float* g,
                   const uint32_t* starts, int64_t count) {
  // Both ranges, then both scales: a scale is a long chain of dependent operations.
  const bool group_m = p.exp_avg.scaling != Scaling::tensor;
  const bool group_v = p.exp_avg_sq.scaling != Scaling::tensor;  // then v is not null
  const GroupRange range_m = group_m ? range_of(m, count) : GroupRange{};
  const GroupRange range_v = group_v ? range_of(v, count) : GroupRange{};
  if (group_m) choose_scale(p.exp_avg, i, range_m);
  if (group_v) choose_scale(p.exp_avg_sq, i, range_v);
  store_exp_avg(p.exp_avg, i, m, g, p.dither, p.stochastic_exp_avg ? starts : nullptr, count);
  if (v != nullptr) store_exp_avg_sq(p.exp_avg_sq, i, v, count);
}

// The values of a state from element i on: where they lie, if that is as f32, else in `buffer`.
float* in_place(float* buffer, const StateSpan& s, int64_t i, int64_t count) {
  if (is_plain(s)) return static_cast<float*>(s.values) + i;
  load_state(buffer, s, i, count);
  return buffer;
}

// The rates of elements i and the following, each its subset's.
void spread_rates(float* out, const AdamSpan& p, int64_t i, int64_t count) {
  const int64_t first = p.begin + i, width = p.subsets.width;
  for (int64_t j = 0; j < count;) {
    const int64_t inside = (first + j) % width;
    const int64_t n = std::min(count - j, width - inside);  // up to the next row
    if (p.subsets.strided)
      std::copy_n(p.rates + inside, n, out + j);
    else
      std::fill_n(out + j, n, p.rates[(first + j) / width]);
    j += n;
  }
}

void adam_run(const AdamSpan& p, const AdamStep& s, int64_t i, const float* g, float* w,
              const uint32_t* starts, int64_t count) {
  alignas(64) float first[kRun], second[kRun];
  float* m = in_place(first, p.exp_avg, i, count);
  if (p.rates != nullptr) {
    spread_rates(second, p, i, count);
    with_count(count, [&](int64_t n) {
      QUAVER_SIMD
      for (int64_t j = 0; j < n; ++j) {
        const AdamElement e = subset_adamw(s, {w[j], m[j], 0.0f}, g[j], second[j]);
        w[j] = e.weight;
        m[j] = e.exp_avg;
      }
    });
    return store_moments(p, i, m, nullptr, g, starts, count);
  }
  float* v = in_place(second, p.exp_avg_sq, i, count);
  with_count(count, [&](int64_t n) {
    QUAVER_SIMD
    for (int64_t j = 0; j < n; ++j) {
      const AdamElement e = adamw(s, {w[j], m[j], v[j]}, g[j]);
      w[j] = e.weight;
      m[j] = e.exp_avg;
      v[j] = e.exp_avg_sq;
    }
  });
  store_moments(p, i, m, v, g, starts, count);
}

#if defined(__AVX2__)
// Updates whole groups whose moments are both expanded, by expanded.h.
template <class First, class Second>
void adam_expanded(const AdamSpan& p, const AdamStep& s, int64_t i, const float* g, float* w,
                   int64_t groups) {
  alignas(64) float m[kBlock], v[kBlock];
  GroupRanges range_m, range_v;
  bool ordinary[kGroups];
  auto* codes_m = static_cast<uint8_t*>(p.exp_avg.values) + i;
  auto* codes_v = static_cast<uint8_t*>(p.exp_avg_sq.values) + i;
  float* scales_m = p.exp_avg.scales + i / kGroup;
  float* scales_v = p.exp_avg_sq.scales + i / kGroup;
  auto values = [](const StateSpan& state, float scale) {
    return expanded_values(state.type, bit_cast<uint32_t>(scale) & kPowerMask);
  };
  for (int64_t k = 0; k < groups; ++k) {
    const int64_t j = k * kGroup;
    ordinary[k] = adam_group(s, w + j, m + j, v + j, g + j, codes_m + j, scales_m[k],
                             values(p.exp_avg, scales_m[k]), codes_v + j, scales_v[k],
                             values(p.exp_avg_sq, scales_v[k]), &range_m, &range_v, k);
  }
  const GroupScales chosen_m = choose_scales<First>(range_m);
  const GroupScales chosen_v = choose_scales<Second>(range_v);
  for (int64_t k = 0; k < groups; ++k) {
    const int64_t j = k * kGroup;
    if (!ordinary[k]) {
      store_moments(p, i + j, m + j, v + j, g + j, nullptr, kGroup);  // expanded: to nearest
      continue;
    }
    scales_m[k] = chosen_m.scale[k];
    scales_v[k] = chosen_v.scale[k];
    encode_exp_avg<First>(codes_m + j, m + j, g + j,
                          {chosen_m.lift[k], chosen_m.power[k], chosen_m.offset[k]});
    encode_exp_avg_sq<Second>(codes_v + j, v + j,
                              {chosen_v.lift[k], chosen_v.power[k], chosen_v.offset[k]});
  }
}
#endif

// The largest magnitude code of a state with one scale; other states need no amax.
void collect(const StateSpan& s, int64_t i, int64_t n, uint32_t& result) {
  if (s.scaling != Scaling::tensor || s.type == DType::f32 || s.type == DType::bf16) return;
  const void* x = at(s.values, s.type, i);
  const uint32_t seen = s.type == DType::f16 ? amax_code<uint16_t>(static_cast<const f16*>(x), n)
                                             : amax_code<uint8_t>(static_cast<const e4m3*>(x), n);
  result = result < seen ? seen : result;
}

uint32_t amax_of_code(const StateSpan& s, uint32_t code) {
  float value = 0.0f;
  if (s.type == DType::f16) value = decode(f16{static_cast<uint16_t>(code)});
  if (s.type == DType::e4m3) value = decode(e4m3{static_cast<uint8_t>(code)});
  if (s.type == DType::e5m2) value = decode(e5m2{static_cast<uint8_t>(code)});
  return bit_cast<uint32_t>(value * s.new_scale);
}

// Steps count <= kBlock elements from i on; raises the largest codes of the states.
void adam_block(const AdamSpan& p, const AdamStep& s, int64_t i, int64_t count,
                uint32_t (&codes)[3]) {
  alignas(64) float gradients[kBlock], weights[kBlock];
  alignas(64) uint32_t starts[kBlock];
  const float* g = gradients;
  float* w = weights;
  // Unscaled f32 is read in place.
  const bool plain_weight = p.weight.type == DType::f32 && p.weight.scale == 1.0f;
  if (p.grad_type == DType::f32 && p.grad_scale == 1.0f) {
    g = static_cast<const float*>(p.grad) + i;
  } else {
    const void* from = at(p.grad, p.grad_type, i);
    prefetch(from, count * size_of(p.grad_type));
    load_any(gradients, from, p.grad_type, count, p.grad_scale);
  }
  if (plain_weight)
    w = static_cast<float*>(p.weight.values) + i;
  else
    load_weight(weights, p, i, count);
  if (p.stochastic) dither_starts(starts, p, i, count);
  int64_t done = 0;
#if defined(__AVX2__)
  if (p.exp_avg.scaling == Scaling::expand && p.exp_avg_sq.scaling == Scaling::expand) {
    done = count / kGroup * kGroup;
    with_fp8(p.exp_avg.type, [&](auto first) {
      with_fp8(p.exp_avg_sq.type, [&](auto second) {
        adam_expanded<decltype(first), decltype(second)>(p, s, i, g, w, count / kGroup);
      });
    });
  }
#endif
  for (int64_t j = done; j < count; j += kRun)
    adam_run(p, s, i + j, g + j, w + j, starts + j, count - j < kRun ? count - j : kRun);
  if (!plain_weight) store_weight(p, i, weights, starts, count);
  const StateSpan* states[3] = {&p.weight, &p.exp_avg, &p.exp_avg_sq};
  for (int k = 0; k < 3; ++k) collect(*states[k], i, count, codes[k]);
  if (p.fp8 == nullptr) return;
  // The copy is made from the stored codes, so that a reloaded weight gives the same copy.
  load(gradients, static_cast<const f16*>(p.weight.values) + i, count, 1.0f / kMasterToFp8);
  store(reinterpret_cast<e4m3*>(p.fp8) + i, gradients, count, 1.0f);
}

#if defined(__AVX2__)
// Steps the whole registers of a span whose states are scaled_adam.h's; returns how many elements
// those are.
template <class Grad>
int64_t adam_scaled(const AdamSpan& p, const AdamStep& s, int64_t n, uint32_t (&codes)[3]) {
  CodeMaxima most;
  int64_t i = 0;
  for (; i + kValues <= n; i += kValues)
    if (!step_scaled<Grad>(p, s, i, &most)) adam_block(p, s, i, kValues, codes);
  codes[0] = std::max(codes[0], largest_code<uint16_t>(most.weight));
  codes[1] = std::max(codes[1], largest_code<uint8_t>(most.exp_avg));
  codes[2] = std::max(codes[2], largest_code<uint16_t>(most.exp_avg_sq));
  return i;
}
#endif

}  // namespace

void encode_groups(const StateSpan& s, const void* x, DType type, int64_t n) {
  alignas(64) float values[kRun], y[kRun];
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t count = n - i < kRun ? n - i : kRun;
    const float* from = reinterpret_cast<const float*>(at(x, type, i));
    if (type != DType::f32) {
      load_any(values, at(x, type, i), type, count, 1.0f);
      from = values;
    }
    choose_scale(s, i, range_of(from, count));
    auto run = [&](auto format) {
      using T = decltype(format);
      to_format<T>(y, from, s, i, count);
      QUAVER_SIMD
      for (int64_t j = 0; j < count; ++j) y[j] = keep_nonzero<T>(y[j], from[j]);
      store(static_cast<T*>(s.values) + i, y, count, 1.0f);
    };
    with_fp8(s.type, run);
  }
}

void decode_groups(float* out, const StateSpan& s, int64_t n) {
  for (int64_t i = 0; i < n; i += kRun) load_state(out + i, s, i, n - i < kRun ? n - i : kRun);
}

void adam(const AdamSpan& span, const AdamStep& step, int64_t n, uint32_t amax_bits[3]) {
  const AdamSpan p = span;
  const AdamStep s = step;
  uint32_t codes[3] = {0, 0, 0};
  int64_t i = 0;
#if defined(__AVX2__)
  if (has_scaled_states(p))
    with_type(p.grad_type, p.grad, [&](auto* grad) {
      i = adam_scaled<std::remove_const_t<std::remove_pointer_t<decltype(grad)>>>(p, s, n, codes);
    });
#endif
  for (; i < n; i += kBlock) adam_block(p, s, i, n - i < kBlock ? n - i : kBlock, codes);
  const StateSpan* states[3] = {&p.weight, &p.exp_avg, &p.exp_avg_sq};
  for (int k = 0; k < 3; ++k) amax_bits[k] = amax_of_code(*states[k], codes[k]);
}

}  // namespace quaver::cpu::QUAVER_ISA
