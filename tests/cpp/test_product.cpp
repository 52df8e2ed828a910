// The CPU's products of codes: each table's loops, and whole products for any size, layout and
// number of threads.
#include <cmath>
#include <thread>

#include "cpu/simd_product.h"
#include "every_isa.h"
#include "quaver/fp8.h"
#include "quaver/gemm.h"

namespace quaver::cpu {

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const ProductSimd product_table;
}
namespace avx512 {
extern const ProductSimd product_table;
}
namespace avx2 {
extern const ProductSimd product_table;
}
#endif

}  // namespace quaver::cpu

namespace {

using cpu::CodeRows;
using cpu::ProductSimd;

// Those that this machine can run, whichever it would choose.
std::vector<const ProductSimd*> tables() {
  std::vector<const ProductSimd*> found;
#if defined(__x86_64__)
  const auto has = [](const char* wanted) {
    int count = 0;
    const char* const* names = cpu::available_isas(&count);
    return std::any_of(names, names + count,
                       [&](auto* name) { return std::string(name) == wanted; });
  };
  if (has("avx2")) found.push_back(&cpu::avx2::product_table);
  if (has("avx512")) found.push_back(&cpu::avx512::product_table);
  if (has("avx512") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"))
    found.push_back(&cpu::avx512_bf16::product_table);
#endif
  return found;
}

float value_of(DType type, uint8_t code) {
  return type == DType::e4m3 ? decode(e4m3{code}) : decode(e5m2{code});
}

// Codes of small integers, whose products have exact sums in any order.
std::vector<uint8_t> integers(DType type, int64_t n, uint64_t seed) {
  std::vector<uint8_t> codes(n);
  for (int64_t i = 0; i < n; ++i) {
    const float v = static_cast<float>(static_cast<int>(random_bits(seed, i) % 9) - 4);
    codes[i] = type == DType::e4m3 ? encode_nearest<e4m3>(v).bits : encode_nearest<e5m2>(v).bits;
  }
  return codes;
}

struct Packed {
  std::vector<uint32_t> a, b;
  int64_t pitch, words;
};

Packed packed(const ProductSimd& simd, const CodeRows& a, const CodeRows& b) {
  Packed p;
  p.words = (a.k + simd.depth - 1) / simd.depth;
  const int64_t whole = (p.words + simd.step - 1) / simd.step * simd.step;
  p.pitch = whole + 3;
  p.a.resize(a.rows * p.pitch);
  p.b.resize(whole * simd.cols);
  simd.decode_rows(p.a.data(), p.pitch, a);
  simd.pack_columns(p.b.data(), b);
  return p;
}

std::vector<float> sums_of(const ProductSimd& simd, const CodeRows& a, const CodeRows& b) {
  const Packed p = packed(simd, a, b);
  std::vector<float> sums(simd.rows * simd.cols, -1.0f);
  simd.multiply(sums.data(), p.a.data(), p.pitch, p.b.data(), a.rows, p.words, p.b.data());
  return sums;
}

struct Problem {
  int64_t m, n, k;
  DType a, b, out;
  Layout layout_a, layout_b;
};

int64_t scales_of(const Layout& layout, int64_t rows, int64_t k) {
  return layout.scale_count(TensorView{nullptr, DType::e4m3, rows, k});
}

float scale_at(const Layout& layout, const std::vector<float>& scales, int64_t row, int64_t i,
               int64_t k) {
  if (layout.grain == Grain::tensor) return scales[0];
  return scales[row / layout.height() * layout.scales_in_row(k) + i / layout.width(k)];
}

std::vector<float> powers(int64_t n, uint64_t seed) {
  std::vector<float> scales(std::max<int64_t>(n, 1));  // a pointer even to none
  n = static_cast<int64_t>(scales.size());
  for (int64_t i = 0; i < n; ++i)
    scales[i] = std::ldexp(1.0f, static_cast<int>(random_bits(seed, i) % 5) - 2);
  return scales;
}

// A product of integers under powers of two, with a bias or an addend, is exact: every bit is
// known.
void check_product(const Problem& p, bool bias, bool accumulate) {
  std::vector<uint8_t> a = integers(p.a, p.m * p.k, 1), b = integers(p.b, p.n * p.k, 2);
  std::vector<float> scale_a = powers(scales_of(p.layout_a, p.m, p.k), 3);
  std::vector<float> scale_b = powers(scales_of(p.layout_b, p.n, p.k), 4);
  std::vector<float> added = powers(p.n, 5);
  std::vector<float> out(p.m * p.n, 3.0f);
  std::vector<uint16_t> half(p.m * p.n, encode_bf16(3.0f).bits);
  GemmArguments g;
  g.out =
      p.out == DType::f32 ? view(out.data(), p.out, p.m, p.n) : view(half.data(), p.out, p.m, p.n);
  g.a = view(a.data(), p.a, p.m, p.k);
  g.b = view(b.data(), p.b, p.n, p.k);
  g.scale_a = scale_a.data();
  g.scale_b = scale_b.data();
  g.bias = bias ? added.data() : nullptr;
  g.accumulate = accumulate;
  cpu::gemm(g, p.layout_a, p.layout_b);
  for (int64_t r = 0; r < p.m; ++r) {
    for (int64_t c = 0; c < p.n; ++c) {
      double wanted = (bias ? added[c] : 0.0) + (accumulate ? 3.0 : 0.0);
      for (int64_t k = 0; k < p.k; ++k)
        wanted += double(value_of(p.a, a[r * p.k + k])) * scale_at(p.layout_a, scale_a, r, k, p.k) *
                  value_of(p.b, b[c * p.k + k]) * scale_at(p.layout_b, scale_b, c, k, p.k);
      const float y = static_cast<float>(wanted);
      if (p.out == DType::f32)
        CHECK_EQ(out[r * p.n + c], y);
      else
        CHECK_EQ(half[r * p.n + c], encode_bf16(y).bits);
    }
  }
}

void on_three(int64_t n, int64_t grain, void* context, cpu::ParallelBody body) {
  std::vector<std::thread> threads;
  const int64_t part = std::max(grain, (n + 2) / 3);
  for (int64_t i = 0; i < n; i += part)
    threads.emplace_back([=] { body(context, i, std::min(n, i + part)); });
  for (std::thread& t : threads) t.join();
}

void serially(int64_t n, int64_t, void* context, cpu::ParallelBody body) { body(context, 0, n); }

template <class Body>
void on_every_isa(Body body) {
  const std::string before = cpu::isa();
  int count = 0;
  const char* const* names = cpu::available_isas(&count);
  for (int i = 0; i < count; ++i) {
    cpu::set_isa(names[i]);
    if (cpu::has_gemm()) body();
  }
  cpu::set_isa(before.c_str());
}

}  // namespace

TEST(every_code) {
  for (const ProductSimd* simd : tables()) {
    for (const DType type : {DType::e4m3, DType::e5m2}) {
      // A row of each code by a one in its place.
      for (int code = 0; code < 256; ++code) {
        const int64_t k = 70, place = code % k;
        std::vector<uint8_t> a(k), b(k);
        a[place] = static_cast<uint8_t>(code);
        b[place] = encode_nearest<e4m3>(1.0f).bits;
        const float wanted = value_of(type, a[place]);
        const CodeRows row = {a.data(), type, k, 1, k}, one = {b.data(), DType::e4m3, k, 1, k};
        const float by_rows = sums_of(*simd, row, one)[0], by_columns = sums_of(*simd, one, row)[0];
        if (std::isnan(wanted)) {
          CHECK(std::isnan(by_rows) && std::isnan(by_columns));
        } else {
          CHECK_EQ(by_rows, wanted);
          CHECK_EQ(by_columns, wanted);
        }
      }
    }
  }
}

TEST(tiles_of_every_size) {
  for (const ProductSimd* simd : tables()) {
    for (const int64_t k : {0, 1, 2, 15, 16, 31, 33, 63, 64, 65, 127, 129, 200}) {
      for (int64_t rows = 1; rows <= simd->rows; ++rows) {
        const int64_t cols = k % 2 == 0 ? simd->cols : simd->cols - 3, stride = k + 5;
        const std::vector<uint8_t> a = integers(DType::e5m2, rows * stride, 1);
        const std::vector<uint8_t> b = integers(DType::e4m3, cols * stride, 2);
        const std::vector<float> sums = sums_of(*simd, {a.data(), DType::e5m2, stride, rows, k},
                                                {b.data(), DType::e4m3, stride, cols, k});
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < simd->cols; ++c) {
            float wanted = 0.0f;
            for (int64_t i = 0; i < k && c < cols; ++i)
              wanted += value_of(DType::e5m2, a[r * stride + i]) *
                        value_of(DType::e4m3, b[c * stride + i]);
            CHECK_EQ(sums[r * simd->cols + c], wanted);
          }
        }
      }
    }
  }
}

TEST(products_of_integers) {
  const Layout layouts[] = {{}, {Grain::row}, {Grain::block}, {Grain::tile}};
  on_every_isa([&] {
    for (const Layout& a : layouts)
      for (const Layout& b : layouts)
        for (const DType out : {DType::f32, DType::bf16})
          for (const auto& [m, n, k] : {std::tuple(13, 70, 300), {130, 131, 128}, {1, 1, 1}})
            check_product({m, n, k, DType::e4m3, DType::e5m2, out, a, b}, m == 13, m == 130);
    check_product({5, 9, 0, DType::e4m3, DType::e4m3, DType::f32, {}, {Grain::block}}, true, false);
    check_product({700, 64, 16, DType::e5m2, DType::e4m3, DType::f32, {}, {}}, false, false);
    check_product({3, 600, 4100, DType::e4m3, DType::e4m3, DType::bf16, {Grain::row}, {}}, true,
                  false);
  });
}

TEST(threads_change_no_bit) {
  const int64_t m = 200, n = 300, k = 500;
  std::vector<uint8_t> a(m * k), b(n * k);
  for (int64_t i = 0; i < m * k; ++i) a[i] = static_cast<uint8_t>(random_bits(7, i) % 120);
  for (int64_t i = 0; i < n * k; ++i) b[i] = static_cast<uint8_t>(random_bits(8, i) % 120);
  float one = 1.0f;
  const auto run = [&](cpu::ParallelFor threads) {
    std::vector<float> out(m * n);
    GemmArguments g;
    g.out = view(out.data(), DType::f32, m, n);
    g.a = view(a.data(), DType::e4m3, m, k);
    g.b = view(b.data(), DType::e4m3, n, k);
    g.scale_a = g.scale_b = &one;
    cpu::set_parallel_for(threads);
    cpu::gemm(g, {}, {});
    cpu::set_parallel_for(serially);
    return out;
  };
  on_every_isa([&] { CHECK(run(serially) == run(on_three)); });
}

TEST(what_it_cannot_multiply_is_refused_by_name) {
  std::vector<uint8_t> codes(16 * 16);
  std::vector<float> out(16 * 16), scales(16, 1.0f);
  GemmArguments g;
  g.a = g.b = view(codes.data(), DType::e4m3, 16, 16);
  g.scale_a = g.scale_b = scales.data();
  g.out = view(out.data(), DType::f16, 16, 16);
  const std::string before = cpu::isa();
  cpu::set_isa("portable");
  CHECK_THROWS(cpu::gemm(g, {}, {}), "portable has no products of its own");
  cpu::set_isa(before.c_str());
  on_every_isa([&] {
    g.out.dtype = DType::f16;
    CHECK_THROWS(cpu::gemm(g, {}, {}), "writes f32 or bf16, got f16");
    g.out.dtype = DType::f32;
    CHECK_THROWS(cpu::gemm(g, {Grain::block, 32}, {}), "1 x 128, got 1 x 32");
  });
}

// A register of either width takes FMAs in the order of K.
TEST(f32_has_the_same_bits_at_every_width) {
  const std::vector<const ProductSimd*> all = tables();
  if (all.size() < 2) return;
  const int64_t k = 333;
  std::vector<uint8_t> a(k), b(k);
  for (int64_t i = 0; i < k; ++i) {
    a[i] = static_cast<uint8_t>(random_bits(9, i) % 120);
    b[i] = static_cast<uint8_t>(random_bits(10, i) % 120);
  }
  const CodeRows left = {a.data(), DType::e4m3, k, 1, k}, right = {b.data(), DType::e4m3, k, 1, k};
  CHECK_EQ(sums_of(*all[0], left, right)[0], sums_of(*all[1], left, right)[0]);
}
