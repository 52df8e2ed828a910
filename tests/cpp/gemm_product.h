// A matrix product with its operands, its result and what it should be, in f64: what the tests of
// every GPU's kernels share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "quaver/check.h"
#include "quaver/fp8.h"
#include "quaver/gemm_choice.h"
#include "quaver/layout.h"

namespace quaver::test {

using Bytes = std::vector<unsigned char>;
using Generator = std::mt19937;

struct ProductShape {
  int64_t m, n, k;
  int multiprocessors;
};

struct ProductCase {
  const char* name;
  ProductShape shape;
  bool rows = false;        // scales for each row
  bool second = false;      // the other output format of that size
  bool accumulate = false;  // where the tactic can
  bool cut = false;         // sums are cut as by the tensor core
  bool hopper = true;
  int64_t skew = 0;  // bytes between an aligned address and the operands'
};

template <class T>
double put(unsigned char* to, T code) {
  std::memcpy(to, &code, sizeof(T));
  return double(decode(code));
}

inline double encode_into(unsigned char* to, DType dtype, float x) {
  switch (dtype) {
    case DType::e4m3: return put(to, encode_nearest<e4m3>(x));
    case DType::e5m2: return put(to, encode_nearest<e5m2>(x));
    case DType::f16: return put(to, encode_nearest<f16>(x));
    case DType::bf16: return put(to, encode_bf16(x));
    default: std::memcpy(to, &x, sizeof(x)); return double(x);
  }
}

inline double decode_from(const unsigned char* from, DType dtype) {
  uint8_t byte;
  uint16_t half = 0;
  float x;
  std::memcpy(&byte, from, sizeof(byte));
  if (size_of(dtype) == 2) std::memcpy(&half, from, sizeof(half));
  switch (dtype) {
    case DType::e4m3: return double(decode(e4m3{byte}));
    case DType::e5m2: return double(decode(e5m2{byte}));
    case DType::f16: return double(decode(f16{half}));
    case DType::bf16: return double(decode(bf16{half}));
    default: std::memcpy(&x, from, sizeof(x)); return double(x);
  }
}

// Values of a format, as codes and as numbers. The codes end where their memory does, so that an
// access behind them is found.
class Values {
 public:
  Values(Generator* g, DType dtype, int64_t count, int64_t skew = 0)
      : size_(size_of(dtype)), skew_(skew * size_), memory_(count * size_ + skew_) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i)
      numbers.push_back(encode_into(codes() + i * size_, dtype, normal(*g)));
  }
  unsigned char* codes() { return memory_.data() + skew_; }
  const unsigned char* codes() const { return memory_.data() + skew_; }
  std::vector<double> numbers;

 private:
  int64_t size_, skew_;
  Bytes memory_;
};

inline std::vector<float> random_scales(Generator* g, int64_t count) {
  std::uniform_real_distribution<float> uniform(0.25f, 1.0f);
  std::vector<float> scales(count);
  for (float& s : scales) s = uniform(*g);
  return scales;
}

inline DType out_of(const GemmTactic& t, bool second = false) {
  switch (t.out) {
    case GemmOut::half: return second ? DType::f16 : DType::bf16;
    case GemmOut::fp8: return second ? DType::e5m2 : DType::e4m3;
    default: return DType::f32;
  }
}

class Product {
 public:
  Product(const GemmTactic& t, const ProductCase& s)
      : tactic_(t),
        shape_(s.shape),
        out_dtype_(out_of(t, s.second)),
        cut_(s.cut),
        a_(&g_, t.a, shape_.m * shape_.k, s.skew),
        b_(&g_, t.b, shape_.n * shape_.k, s.skew),
        out_(&g_, out_dtype_, shape_.m * shape_.n, s.skew),
        blocks_(t.scales == GemmScales::outer ? 1 : blocks_in_row(shape_.k, kScaleTile)),
        fine_(s.rows || t.scales != GemmScales::outer),
        scale_a_(random_scales(&g_, (fine_ ? shape_.m : 1) * blocks_)),
        scale_b_(random_scales(&g_, (row_b(fine_ ? shape_.n - 1 : 0) + 1) * blocks_)),
        bias_(random_scales(&g_, shape_.n)) {
    GemmArguments& p = arguments_;
    p.out = {out_.codes(), out_dtype_, shape_.m, shape_.n};
    p.a = {a_.codes(), t.a, shape_.m, shape_.k};
    p.b = {b_.codes(), t.b, shape_.n, shape_.k};
    p.scale_a = scale_a_.data();
    p.scale_b = scale_b_.data();
    p.rows_a = p.rows_b = s.rows && t.scales == GemmScales::outer;
    p.scales = t.scales;
    p.accumulate = s.accumulate && t.source;
    p.bias = p.accumulate && !s.hopper ? nullptr : bias_.data();
    p.fast_accumulate = t.fast;
    if (is_fp8(out_dtype_)) {
      p.out_scale = &out_scale_;
      p.amax = &amax_;
    }
    const GemmProblem problem = gemm_problem(p, s.hopper ? 9 : 8);
    for (const GemmCandidate& c : gemm_candidates(problem, shape_.multiprocessors))
      if (c.tactic == &t) candidate_ = c;
    if (!candidate_.tactic) fail("the tactic does not serve the problem");
  }

  const GemmCandidate& candidate() const { return candidate_; }
  const GemmLaunch& launch() const { return candidate_.launch; }
  GemmArguments& arguments() { return arguments_; }
  const Values& result() const { return out_; }

  template <class F>
  void run(F kernel) {
    Bytes workspace(candidate_.workspace_bytes, 0xee);
    GemmLaunch launch = candidate_.launch;
    launch.workspace = workspace.data();
    launch.workspace_bytes = candidate_.workspace_bytes;
    kernel(arguments_, launch);
  }

  // Compares with f64. Returns how many elements are farther from it than sums in f32 may be.
  int64_t check() const {
    double largest = 0;
    int64_t beyond = 0;
    const int64_t size = size_of(out_dtype_);
    const double unit = is_fp8(out_dtype_) ? double(out_scale_) : 1.0;
    for (int64_t i = 0; i < shape_.m; ++i)
      for (int64_t j = 0; j < shape_.n; ++j) {
        const Expected e = expected(i, j);
        const int64_t at = i * shape_.n + j;
        const double got = decode_from(out_.codes() + at * size, out_dtype_) * unit;
        const double off = std::fabs(got - e.value);
        if (!(off <= e.bound + e.cut_bound))
          fail("element (", i, ", ", j, ") is ", got, ", not ", e.value, " within ",
               e.bound + e.cut_bound);
        beyond += off > e.bound;
        largest = std::max(largest, std::fabs(e.value));
      }
    if (is_fp8(out_dtype_) && !cut_ && !(std::fabs(double(amax_) - largest) <= 1e-5 * largest))
      fail("the amax is ", amax_, ", not ", largest);
    return beyond;
  }

 private:
  struct Expected {
    double value, bound, cut_bound;
  };
  // The bounds are those of reference.gemm_tolerance, K roundings and one of the result, and of
  // reference.tensor_core_tolerance. A product meets no more than K roundings on its way where sums
  // start anew each 128 of K: those of its block, one of each later block, and two of its scales.
  Expected expected(int64_t i, int64_t j) const {
    constexpr int64_t kDepth = 32;
    const double* a = a_.numbers.data() + i * shape_.k;
    const double* b = b_.numbers.data() + j * shape_.k;
    double sum = 0, magnitude = 0, partial = 0, lost = 0;
    for (int64_t start = 0; start < shape_.k; start += kDepth) {
      double largest_a = 0, largest_b = 0, step = 0;
      const double scale = scale_at(i, j, start);
      for (int64_t k = start; k < std::min(start + kDepth, shape_.k); ++k) {
        step += a[k] * b[k] * scale;
        magnitude += std::fabs(a[k] * b[k]) * scale;
        largest_a = std::max(largest_a, std::fabs(a[k]) * scale);
        largest_b = std::max(largest_b, std::fabs(b[k]));
      }
      if (!tactic_.fast && start % kGemmTileK == 0) partial = 0;
      lost += 33 * 0x1p-13 * std::max(largest_a * largest_b, std::fabs(partial) + lost);
      partial += step;
      sum += step;
    }
    const double addend = arguments_.accumulate ? out_.numbers[i * shape_.n + j] : 0;
    const double bias = arguments_.bias ? double(arguments_.bias[j]) : 0;
    const double value = sum + bias + addend;
    magnitude += std::fabs(bias) + std::fabs(addend);
    return {value, magnitude * (double(shape_.k) + 4) * 0x1p-24 + rounding(value),
            cut_ ? lost * (1 + 2 * rounding(1)) : 0};
  }
  int64_t row_b(int64_t j) const {
    return tactic_.scales == GemmScales::tiles ? j / kScaleTile : j;
  }
  double scale_at(int64_t i, int64_t j, int64_t k) const {
    const int64_t block = blocks_ > 1 ? k / kScaleTile : 0;
    return double(scale_a_[(fine_ ? i : 0) * blocks_ + block]) *
           double(scale_b_[row_b(fine_ ? j : 0) * blocks_ + block]);
  }
  double rounding(double value) const {
    switch (out_dtype_) {
      case DType::e4m3: return std::fabs(value) * 0x1p-4 + double(out_scale_) * 0x1p-10;
      case DType::e5m2: return std::fabs(value) * 0x1p-3 + double(out_scale_) * 0x1p-17;
      case DType::f16: return std::fabs(value) * 0x1p-11 + 0x1p-25;
      case DType::bf16: return std::fabs(value) * 0x1p-8;
      default: return std::fabs(value) * 0x1p-24;
    }
  }

  Generator g_{7};
  const GemmTactic& tactic_;
  ProductShape shape_;
  DType out_dtype_;
  bool cut_;
  Values a_, b_, out_;
  int64_t blocks_;  // scales along K
  bool fine_;       // more scales than one along M and N
  std::vector<float> scale_a_, scale_b_, bias_;
  float out_scale_ = 0.25f, amax_ = 0;
  GemmArguments arguments_;
  GemmCandidate candidate_;
};

}  // namespace quaver::test
