// The matrix products that ship, run on the interpreter of PTX and compared with f64: every tactic,
// in situations that a GPU gives by chance only.
#include <algorithm>
#include <cmath>
#include <random>

#include "../runtime/runtime.h"
#include "gemm_tactics.h"
#include "quaver/fp8.h"
#include "quaver/gemm_choice.h"
#include "quaver/layout.h"
#include "test.h"

using namespace quaver;

namespace quaver::cuda::gemm_sm90 {

#define QUAVER_ROW(NAME, ...) void run_##NAME(const GemmArguments&, const GemmLaunch&);
QUAVER_GEMM_TACTICS(QUAVER_ROW)
#undef QUAVER_ROW

constexpr void (*kRun[])(const GemmArguments&, const GemmLaunch&) = {
#define QUAVER_ROW(NAME, ...) run_##NAME,
    QUAVER_GEMM_TACTICS(QUAVER_ROW)
#undef QUAVER_ROW
};

}  // namespace quaver::cuda::gemm_sm90

namespace {

using Bytes = std::vector<unsigned char>;
using Generator = std::mt19937;

struct Shape {
  int64_t m, n, k;
  int multiprocessors;
};

// What a launch may meet. The order of warps is the machine's free choice, as is when copies land
// and products are computed between their start and the wait for them.
struct Situation {
  const char* name;
  Shape shape;
  ptx::LaunchOptions options = {};
  bool rows = false;        // scales for each row
  bool second = false;      // the other output format of that size
  bool accumulate = false;  // where the tactic can
};

// Values of a format, as codes and as numbers.
struct Values {
  Bytes codes;
  std::vector<double> numbers;
};

template <class T>
double put(unsigned char* to, T code) {
  std::memcpy(to, &code, sizeof(T));
  return double(decode(code));
}

double encode_into(unsigned char* to, DType dtype, float x) {
  switch (dtype) {
    case DType::e4m3: return put(to, encode_nearest<e4m3>(x));
    case DType::e5m2: return put(to, encode_nearest<e5m2>(x));
    case DType::f16: return put(to, encode_nearest<f16>(x));
    case DType::bf16: return put(to, encode_bf16(x));
    default: std::memcpy(to, &x, sizeof(x)); return double(x);
  }
}

double decode_from(const unsigned char* from, DType dtype) {
  uint8_t byte;
  uint16_t half;
  float x;
  std::memcpy(&byte, from, sizeof(byte));
  switch (dtype) {
    case DType::e4m3: return double(decode(e4m3{byte}));
    case DType::e5m2: return double(decode(e5m2{byte}));
    case DType::f16: std::memcpy(&half, from, sizeof(half)); return double(decode(f16{half}));
    case DType::bf16: std::memcpy(&half, from, sizeof(half)); return double(decode(bf16{half}));
    default: std::memcpy(&x, from, sizeof(x)); return double(x);
  }
}

Values random_values(Generator* g, DType dtype, int64_t count) {
  std::normal_distribution<float> normal;
  const int64_t size = size_of(dtype);
  Values v;
  v.codes.resize(count * size);
  for (int64_t i = 0; i < count; ++i)
    v.numbers.push_back(encode_into(v.codes.data() + i * size, dtype, normal(*g)));
  return v;
}

std::vector<float> random_scales(Generator* g, int64_t count) {
  std::uniform_real_distribution<float> uniform(0.25f, 1.0f);
  std::vector<float> scales(count);
  for (float& s : scales) s = uniform(*g);
  return scales;
}

DType out_of(const GemmTactic& t, bool second = false) {
  switch (t.out) {
    case GemmOut::half: return second ? DType::f16 : DType::bf16;
    case GemmOut::fp8: return second ? DType::e5m2 : DType::e4m3;
    default: return DType::f32;
  }
}

// A call of gemm with its operands, its result and what it should be.
class Product {
 public:
  Product(const GemmTactic& t, const Situation& s)
      : tactic_(t),
        shape_(s.shape),
        out_dtype_(out_of(t, s.second)),
        cut_(s.options.timing.cut_sums),
        a_(random_values(&g_, t.a, shape_.m * shape_.k)),
        b_(random_values(&g_, t.b, shape_.n * shape_.k)),
        out_(random_values(&g_, out_dtype_, shape_.m * shape_.n)),
        blocks_(t.scales == GemmScales::outer ? 1 : blocks_in_row(shape_.k, kScaleTile)),
        fine_(s.rows || t.scales != GemmScales::outer),
        scale_a_(random_scales(&g_, (fine_ ? shape_.m : 1) * blocks_)),
        scale_b_(random_scales(&g_, (row_b(fine_ ? shape_.n - 1 : 0) + 1) * blocks_)),
        bias_(random_scales(&g_, shape_.n)) {
    GemmArguments& p = arguments_;
    p.out = {out_.codes.data(), out_dtype_, shape_.m, shape_.n};
    p.a = {a_.codes.data(), t.a, shape_.m, shape_.k};
    p.b = {b_.codes.data(), t.b, shape_.n, shape_.k};
    p.scale_a = scale_a_.data();
    p.scale_b = scale_b_.data();
    p.rows_a = p.rows_b = s.rows && t.scales == GemmScales::outer;
    p.scales = t.scales;
    p.bias = bias_.data();
    p.accumulate = s.accumulate && t.source;
    p.fast_accumulate = t.fast;
    if (is_fp8(out_dtype_)) {
      p.out_scale = &out_scale_;
      p.amax = &amax_;
    }
    for (const GemmCandidate& c : gemm_candidates(gemm_problem(p), shape_.multiprocessors))
      if (c.tactic == &t) candidate_ = c;
    if (!candidate_.tactic) fail("the tactic does not serve the problem");
    ptx::launch_options = s.options;
  }

  const GemmLaunch& launch() const { return candidate_.launch; }

  void run() {
    Bytes workspace(candidate_.workspace_bytes, 0xee);
    GemmLaunch launch = candidate_.launch;
    launch.workspace = workspace.data();
    launch.workspace_bytes = candidate_.workspace_bytes;
    cuda::gemm_sm90::kRun[candidate_.index](arguments_, launch);
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
        const double got = decode_from(out_.codes.data() + at * size, out_dtype_) * unit;
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
    const double value = sum + double(bias_[j]) + addend;
    magnitude += std::fabs(double(bias_[j])) + std::fabs(addend);
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
  Shape shape_;
  DType out_dtype_;
  bool cut_;
  Values a_, b_, out_;
  int64_t blocks_;  // scales along K
  bool fine_;       // more scales than one along M and N
  std::vector<float> scale_a_, scale_b_, bias_;
  float out_scale_ = 0.125f, amax_ = 0;
  GemmArguments arguments_;
  GemmCandidate candidate_;
};

// Calls f for every tactic; an error tells its name.
template <class F>
void for_each_tactic(F f) {
  for (const GemmTactic& t : gemm_tactics()) try {
      f(t);
    } catch (const Error& error) {
      fail(t.name, ": ", error.what());
    }
}

void check_all(const Situation& s) {
  for_each_tactic([&](const GemmTactic& t) {
    Product p(t, s);
    p.run();
    CHECK_EQ(p.check(), 0);
  });
}

// More tiles than multiprocessors, and rests on every side.
constexpr Shape kLarge = {300, 272, 912, 6}, kSmall = {145, 400, 144, 4}, kLeast = {1, 16, 16, 2};

ptx::Timing late() {
  ptx::Timing t;
  t.late_loads = t.late_stores = t.late_products = true;
  return t;
}

void shuffle(std::vector<int>* warps) {
  static Generator g(3);
  std::shuffle(warps->begin(), warps->end(), g);
}

}  // namespace

TEST(ragged_shapes) {
  check_all({"as they come", kLarge});
  check_all({"scales of rows, the second format", kSmall, {}, true, true});
  check_all({"one row", kLeast});
}

TEST(accumulation) {
  check_all({"bf16", kLarge, {}, false, false, true});
  check_all({"f16", kSmall, {}, true, true, true});
}

TEST(stream_k_cuts_k_in_both_ways) {
  for (const Shape& shape : {Shape{300, 272, 912, 6}, Shape{64, 48, 2064, 4}})
    for_each_tactic([&](const GemmTactic& t) {
      if (t.scheduler != GemmScheduler::stream_k) return;
      Product p(t, {"", shape, {}, false, false, true});
      CHECK_EQ(p.launch().splits > 1, shape.k > 2048);
      p.run();
      CHECK_EQ(p.check(), 0);
    });
}

TEST(copies_and_products_as_late_as_they_may_be) {
  ptx::LaunchOptions options;
  options.timing = late();
  check_all({"late", kLarge, options, false, false, true});
  options.timing.descending = true;
  options.turn = 61;
  options.shuffle = shuffle;
  check_all({"late, in another order", kSmall, options, false, false, true});
}

TEST(each_kind_of_work_late_alone) {
  for (bool ptx::Timing::* kind :
       {&ptx::Timing::late_loads, &ptx::Timing::late_stores, &ptx::Timing::late_products}) {
    ptx::LaunchOptions options;
    options.timing.*kind = true;
    check_all({"one late", kSmall, options});
  }
}

TEST(a_cta_of_a_cluster_that_is_late) {
  for (int rank : {0, 1}) {
    ptx::LaunchOptions options;
    options.timing.late_cta = rank;
    options.shuffle = shuffle;
    check_all({"a late CTA", kSmall, options});
  }
}

TEST(fewer_clusters_at_a_time_than_the_grid_has) {
  ptx::LaunchOptions options;
  options.resident = 1;
  check_all({"one cluster", kLarge, options});
  CHECK(ptx::launch_options.clusters > 1);
}

// Both tolerances of reference/gemm.py, against sums as the tensor core makes them: that of f32
// alone does not hold for fast sums.
TEST(sums_cut_as_by_the_tensor_core_keep_their_tolerance) {
  for_each_tactic([](const GemmTactic& t) {
    ptx::LaunchOptions options;
    options.timing.cut_sums = true;
    Product p(t, {"cut", kLarge, options});
    p.run();
    const int64_t beyond = p.check();
    CHECK(t.out != GemmOut::f32 || !t.fast || beyond > 0);
  });
}
