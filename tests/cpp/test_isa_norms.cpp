// Norms and activations with their saved groups: every instruction set gives the bits of the
// portable code.
#include <cmath>

#include "every_isa.h"
#include "quaver/activate.h"
#include "quaver/codec.h"
#include "quaver/normalize.h"

namespace {

constexpr int64_t kRows = 9;

// A cast of kRows x cols, in memory of its own.
struct Cast {
  explicit Cast(int64_t cols)
      : rows(gemm_padded(kRows)), padded(gemm_padded(cols)), q(rows * padded), qt(rows * padded) {}
  GemmCast to() {
    GemmCast c;
    c.q = view(q.data(), DType::e4m3, rows, padded);
    c.qt = view(qt.data(), DType::e4m3, padded, rows);
    c.scale = &scale;
    c.amax = &amax;
    return c;
  }
  void append_to(Bytes* bytes) const {
    append(bytes, q);
    append(bytes, qt);
    append(bytes, std::vector<float>{scale, std::isnan(amax) ? -1.0f : amax});
  }

  int64_t rows, padded;
  std::vector<uint8_t> q, qt;
  float scale = 0.0f, amax = 0.0f;
};

struct Saved {
  Saved(int64_t cols, int64_t block)
      : cols(cols),
        block(block),
        codes(kRows * cols),
        scale(kRows * ((cols + block - 1) / block)) {}
  GroupedView to() {
    return {view(codes.data(), DType::e4m3, kRows, cols), scale.data(), {Grain::block, block}};
  }
  void append_to(Bytes* bytes) const {
    append(bytes, codes);
    append(bytes, scale);
  }

  int64_t cols, block;
  std::vector<uint8_t> codes, scale;
};

// Values whose magnitudes fit into each other's groups; in some rows over 30 binades, with zeros
// and subnormals, smaller than any normal scale, or with a NaN and infinities.
std::vector<uint32_t> matrix(DType type, int64_t cols, uint64_t seed) {
  const std::vector<float> wide = some_values(kRows * cols, seed);
  std::vector<uint32_t> out(kRows * cols);
  for (int64_t i = 0; i < kRows * cols; ++i) {
    const uint32_t bits = random_bits(seed + 1, i);
    float x = static_cast<float>(static_cast<int32_t>(bits)) * 0x1p-31f;
    const int64_t row = i / cols;
    if (row == 2) x = bits % 3 == 0 ? 0.0f : x;
    if (row == 3) x = wide[i];
    if (row == 4) x *= 0x1p-123f;
    if (row == 5 && i % cols == cols / 2) x = bit_cast<float>(0x7fc00000u);
    if (row == 6 && i % cols == cols / 2) x = bit_cast<float>(0xff800000u);
    if (type == DType::f32)
      out[i] = bit_cast<uint32_t>(x);
    else if (type == DType::bf16)
      reinterpret_cast<bf16*>(out.data())[i] = encode_bf16(x);
    else
      reinterpret_cast<f16*>(out.data())[i] = encode_nearest<f16>(x);
  }
  return out;
}

// NaN has more than one pattern, and which one a sum gives is the compiler's choice.
std::vector<float> without_nan(std::vector<float> x) {
  for (float& v : x) v = std::isnan(v) ? -1.0f : v;
  return x;
}

void normalize_everywhere(DType type, int64_t cols, int64_t block, bool centered, bool affine) {
  std::vector<uint32_t> x = matrix(type, cols, 3), dy = matrix(type, cols, 5);
  std::vector<float> weight = some_values(cols, 7), bias = some_values(cols, 8);
  const TensorView values = view(x.data(), type, kRows, cols);
  const TensorView w = affine ? view(weight.data(), DType::f32, 1, cols) : TensorView{};
  const TensorView b = affine ? view(bias.data(), DType::f32, 1, cols) : TensorView{};
  same_everywhere([&](Bytes* bytes) {
    Cast y(cols);
    Saved saved(cols, block);
    std::vector<float> mean(kRows), rstd(kRows), dx(kRows * cols), dw(cols), db(cols);
    float* means = centered ? mean.data() : nullptr;
    cpu::normalize(y.to(), saved.to(), means, rstd.data(), values, w, b, 1e-5f);
    y.append_to(bytes);
    saved.append_to(bytes);
    append(bytes, without_nan(rstd));
    cpu::normalize_backward(view(dx.data(), DType::f32, kRows, cols), dw.data(), db.data(),
                            view(dy.data(), type, kRows, cols), saved.to(), means, rstd.data(), w);
    for (const std::vector<float>& v : {dx, dw, db}) append(bytes, without_nan(v));
  });
}

void activate_everywhere(DType type, int64_t cols, int64_t block, bool gated) {
  std::vector<uint32_t> x = matrix(type, cols, 13), up = matrix(type, cols, 15);
  const TensorView ups = gated ? view(up.data(), type, kRows, cols) : TensorView{};
  same_everywhere([&](Bytes* bytes) {
    Cast y(cols), dx(cols), dup(cols);
    Saved xs(cols, block), us(cols, block);
    const GroupedView saved_up = gated ? us.to() : GroupedView{};
    cpu::activate(y.to(), xs.to(), saved_up, nullptr, view(x.data(), type, kRows, cols), ups,
                  nullptr, Activation::silu);
    cpu::activate_backward(dx.to(), gated ? dup.to() : GemmCast{},
                           view(x.data(), type, kRows, cols), xs.to(), saved_up, nullptr,
                           Activation::silu);
    for (const Cast* c : {&y, &dx, &dup}) c->append_to(bytes);
    for (const Saved* s : {&xs, &us}) s->append_to(bytes);
  });
}

}  // namespace

TEST(norms) {
  for (const DType type : {DType::bf16, DType::f32, DType::f16})
    for (const int64_t block : {16, 32, 128})
      for (const int64_t cols : {1, 33, 64, 511, 1090})
        for (const bool centered : {false, true})
          normalize_everywhere(type, cols, block, centered, cols != 64);
}

// Rows that are decoded once in the backward, and twice.
TEST(norms_of_long_rows) {
  for (const int64_t cols : {8192, 8193}) normalize_everywhere(DType::bf16, cols, 32, true, true);
}

TEST(activations) {
  for (const DType type : {DType::bf16, DType::f32, DType::f16})
    for (const int64_t block : {16, 32, 128})
      for (const int64_t cols : {1, 33, 64, 511, 1090})
        for (const bool gated : {false, true}) activate_everywhere(type, cols, block, gated);
}
