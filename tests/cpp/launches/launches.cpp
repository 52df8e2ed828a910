// The record of what a CUDA stream would get: csrc/torch and the kernels' host code as they ship,
// with kernels that are compiled for the host (tests/cpp/simt). This file has what that build
// lacks: the matrix product, and a log of the launches that bench/bench_launches.py and
// tests/test_launches.py read.
#include <string>
#include <vector>

#include "arguments.h"
#include "cuda/launch.h"
#include "quaver/fp8.h"
#include "quaver/gemm_choice.h"
#include "quaver/layout.h"

namespace {

using namespace quaver;

std::string* log() {
  static std::string text;
  return &text;
}

void record(const char* op, int64_t blocks) {
  *log() += blocks == 0 ? "clear " : "";
  *log() += op;
  *log() += '\n';
}

double decoded(const TensorView& v, int64_t i) {
  if (v.dtype == DType::e4m3) return decode(v.as<const e4m3>()[i]);
  if (v.dtype == DType::e5m2) return decode(v.as<const e5m2>()[i]);
  if (v.dtype == DType::bf16) return decode(v.as<const bf16>()[i]);
  if (v.dtype == DType::f16) return decode(v.as<const f16>()[i]);
  return v.as<const float>()[i];
}

void encode(const TensorView& v, int64_t i, float x) {
  if (v.dtype == DType::e4m3) v.as<e4m3>()[i] = encode_nearest<e4m3>(x);
  if (v.dtype == DType::e5m2) v.as<e5m2>()[i] = encode_nearest<e5m2>(x);
  if (v.dtype == DType::bf16) v.as<bf16>()[i] = encode_nearest<bf16>(x);
  if (v.dtype == DType::f16) v.as<f16>()[i] = encode_nearest<f16>(x);
  if (v.dtype == DType::f32) v.as<float>()[i] = x;
}

// The scales of the products of a row, a column and a place along K, multiplied.
double scale_at(const GemmArguments& g, int64_t row, int64_t col, int64_t k) {
  if (g.scales == GemmScales::outer)
    return double(g.scale_a[g.rows_a ? row : 0]) * g.scale_b[g.rows_b ? col : 0];
  const int64_t blocks = blocks_in_row(g.a.cols, kScaleTile), block = k / kScaleTile;
  const int64_t row_b = g.scales == GemmScales::tiles ? col / kScaleTile : col;
  return double(g.scale_a[row * blocks + block]) * g.scale_b[row_b * blocks + block];
}

// One value of the product, in f64.
void multiply(const GemmArguments& g, int64_t row, int64_t col) {
  double y = 0.0;
  for (int64_t k = 0; k < g.a.cols; ++k)
    y += decoded(g.a, row * g.a.cols + k) * decoded(g.b, col * g.b.cols + k) *
         scale_at(g, row, col, k);
  const int64_t i = row * g.out.cols + col;
  if (g.bias != nullptr) y += g.bias[col];
  if (g.accumulate) y += decoded(g.out, i);
  const float value = static_cast<float>(y);
  if (g.amax != nullptr) *g.amax = std::max(*g.amax, std::abs(value));
  encode(g.out, i, g.out_scale != nullptr ? value / *g.out_scale : value);
}

}  // namespace

namespace quaver::cuda {

GemmDevice gemm_device() { return {132, 9, 0}; }

// Clears what csrc/cuda/gemm.cu and CUTLASS clear: the amax, and the locks of a split product.
void gemm(const GemmArguments& g, int tactic, const GemmLaunch& l) {
  check_gemm_cuda(g);
  const auto& t = gemm_tactics()[static_cast<size_t>(tactic)];
  QUAVER_CHECK(t.a == g.a.dtype && t.b == g.b.dtype && t.scales == g.scales, "gemm: ", t.name,
               " does not serve this");
  if (g.amax != nullptr) clear("gemm", g.amax, sizeof(float), l.stream);
  if (l.workspace_bytes > 0) record("gemm", 0);
  record("gemm", 1);
  if (simt::control.chosen) return;
  for (int64_t row = 0; row < g.out.rows; ++row)
    for (int64_t col = 0; col < g.out.cols; ++col) multiply(g, row, col);
}

}  // namespace quaver::cuda

#define QUAVER_EXPORT extern "C" __attribute__((visibility("default")))

// Begins a new log. Without `run` launches are logged and no kernel runs.
QUAVER_EXPORT void quaver_launches_begin(bool run) {
  log()->clear();
  simt::control = {};
  simt::control.seen = record;
  simt::control.multiprocessors = 132;
  if (!run) simt::control.chosen = [](int64_t) { return std::vector<int64_t>{}; };
}

// The op of each launch since then, one a line, `clear ` before those that clear memory.
QUAVER_EXPORT const char* quaver_launches_log() { return log()->c_str(); }
