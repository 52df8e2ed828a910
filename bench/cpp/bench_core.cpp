// The core's vector loops without torch: one thread, data in the second-level cache, so that what
// is measured is arithmetic. Prints the best of many runs for each instruction set.
//
//   build/release/bench/bench_core [filter]
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "quaver/cpu.h"
#include "quaver/grad.h"
#include "quaver/optimizer.h"
#include "quaver/quantize.h"

using namespace quaver;

namespace {

constexpr int64_t kRows = 256, kCols = 512, kNumel = kRows * kCols;

double best_ns_per_element(const std::function<void()>& run) {
  double best = 1e30;
  for (int i = 0; i < 200; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run();
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count());
  }
  return best / kNumel;
}

struct Buffer {
  std::vector<char> bytes;
  TensorView view;
  Buffer(DType type, int64_t rows, int64_t cols) : bytes(rows * cols * size_of(type)) {
    view = {bytes.data(), type, rows, cols};
  }
};

}  // namespace

int main(int argc, char** argv) {
  const char* filter = argc > 1 ? argv[1] : "";
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  Buffer x(DType::f32, kRows, kCols), xb(DType::bf16, kRows, kCols), g(DType::f32, kRows, kCols);
  for (int64_t i = 0; i < kNumel; ++i) {
    x.view.as<float>()[i] = normal(random);
    g.view.as<float>()[i] = 1e-3f * normal(random);
  }
  Buffer q(DType::e4m3, kRows, kCols), qt(DType::e4m3, kCols, kRows);
  float scale = 1.0f / 64.0f, odd_scale = 0.013f, amax = 0.0f;
  const TensorView s{&scale, DType::f32, 1, 1}, odd{&odd_scale, DType::f32, 1, 1};
  const TensorView a{&amax, DType::f32, 1, 1};
  cpu::dequantize(xb.view, x.view, TensorView{&(amax = 1.0f), DType::f32, 1, 1}, {});
  const ScaleSource given{true, nullptr}, chosen;

  Buffer w16(DType::f16, kRows, kCols), m8(DType::e4m3, kRows, kCols),
      v16(DType::f16, kRows, kCols), g8(DType::e4m3, kRows, kCols), copy(DType::e4m3, kRows, kCols),
      copy_t(DType::e4m3, kCols, kRows), w(DType::f32, kRows, kCols), m(DType::f32, kRows, kCols),
      v(DType::f32, kRows, kCols);
  float scales[4] = {1e-3f, 1.0f, 1.0f, 1.0f}, amaxes[4] = {1, 0, 0, 1}, copy_scale = 1.0f;
  cpu::quantize(w16.view, {&scales[0], DType::f32, 1, 1}, {&amaxes[0], DType::f32, 1, 1}, x.view,
                {}, chosen);
  cpu::quantize(g8.view, {&scales[3], DType::f32, 1, 1}, {&amaxes[3], DType::f32, 1, 1}, g.view, {},
                chosen);
  int64_t step = 0, skipped = 0;
  const double hyper[5] = {1e-3, 0.9, 0.95, 1e-8, 0.1};
  AdamParameter low;
  low.weight = {w16.view, &scales[0], &amaxes[0]};
  low.exp_avg = {m8.view, &scales[1], &amaxes[1]};
  low.exp_avg_sq = {v16.view, &scales[2], &amaxes[2]};
  low.grad = g8.view;
  low.grad_scale = &scales[3];
  low.grad_amax = &amaxes[3];
  low.step = &step;
  low.hyper = hyper;
  AdamParameter with_copies = low;
  with_copies.fp8 = copy.view;
  with_copies.fp8_t = copy_t.view;
  with_copies.fp8_scale = &copy_scale;
  AdamParameter full = low;
  full.weight = {w.view};
  full.exp_avg = {m.view};
  full.exp_avg_sq = {v.view};
  full.grad = g.view;
  full.grad_scale = nullptr;
  Buffer mc(DType::e4m3, kRows, kCols), vc(DType::e4m3, kRows, kCols);
  std::vector<float> m_scales(kNumel / kGroup), v_scales(kNumel / kGroup);
  std::vector<uint16_t> low_bits(kNumel);
  AdamParameter coat = full, coat_remainder, coat_stochastic;
  coat.exp_avg = {mc.view, m_scales.data(), nullptr, Scaling::expand};
  coat.exp_avg_sq = {vc.view, v_scales.data(), nullptr, Scaling::expand};
  coat.grad = xb.view;
  coat_remainder = coat_stochastic = coat;
  Buffer w_high(DType::bf16, kRows, kCols);
  coat_remainder.weight = coat_stochastic.weight = {w_high.view};
  coat_remainder.remainder = {low_bits.data(), 2};
  coat_stochastic.stochastic = true;

  const std::vector<std::pair<const char*, std::function<void()>>> benches = {
      {"quantize f32, given power of two", [&] { cpu::quantize(q.view, s, a, x.view, {}, given); }},
      {"quantize f32, given other scale",
       [&] { cpu::quantize(q.view, odd, a, x.view, {}, given); }},
      {"quantize f32, just in time", [&] { cpu::quantize(q.view, s, a, x.view, {}, chosen); }},
      {"quantize f32, stochastic",
       [&] { cpu::quantize(q.view, odd, a, x.view, {{}, true}, given); }},
      {"quantize bf16, just in time", [&] { cpu::quantize(q.view, s, a, xb.view, {}, chosen); }},
      {"cast_transpose f32, given",
       [&] { cpu::cast_transpose(q.view, qt.view, s, a, x.view, true, given); }},
      {"cast_transpose bf16, given",
       [&] { cpu::cast_transpose(q.view, qt.view, s, a, xb.view, true, given); }},
      {"dequantize to bf16", [&] { cpu::dequantize(xb.view, q.view, s, {}); }},
      {"dequantize to f32", [&] { cpu::dequantize(g.view, q.view, s, {}); }},
      {"grad_norm e4m3",
       [&] {
         float norm;
         const ScaledView grad{g8.view, &scales[3], nullptr};
         cpu::grad_norm(&norm, &amax, &grad, 1);
       }},
      {"accumulate e4m3",
       [&] { cpu::accumulate(g8.view, &scales[3], &amaxes[3], {q.view, &odd_scale, nullptr}); }},
      {"adam f32 states", [&] { cpu::adam(&full, 1, &skipped); }},
      {"adam O2", [&] { cpu::adam(&low, 1, &skipped); }},
      {"adam O2 with FP8 copies", [&] { cpu::adam(&with_copies, 1, &skipped); }},
      {"adam coat, f32 weights", [&] { cpu::adam(&coat, 1, &skipped); }},
      {"adam coat, bf16 + remainder", [&] { cpu::adam(&coat_remainder, 1, &skipped); }},
      {"adam coat, bf16 stochastic", [&] { cpu::adam(&coat_stochastic, 1, &skipped); }},
  };
  int count = 0;
  const char* const* isas = cpu::available_isas(&count);
  std::printf("%-36s", "ns per element, one thread");
  for (int i = 0; i < count; ++i) std::printf("%10s", isas[i]);
  std::printf("\n");
  for (const auto& [name, run] : benches) {
    if (std::strstr(name, filter) == nullptr) continue;
    std::printf("%-36s", name);
    for (int i = 0; i < count; ++i) {
      cpu::set_isa(isas[i]);
      std::printf("%10.3f", best_ns_per_element(run));
    }
    std::printf("\n");
  }
  return 0;
}
