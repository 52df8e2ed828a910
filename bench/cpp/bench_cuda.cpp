// The memory-bound CUDA kernels without torch and Python, against a device-to-device copy that
// moves the same bytes: by turns, on inputs that are not in the cache.
//
//   bench_cuda [--json FILE] [--pairs N] [FILTER]    measure
//   bench_cuda --check                               compare with the CPU, bit for bit: seconds
//                                                    even under compute-sanitizer
//   bench_cuda --list                                show the rows; needs no GPU
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "quaver/fp8.h"
#include "quaver/grad.h"
#include "quaver/optimizer.h"
#include "quaver/philox.h"
#include "quaver/quantize.h"

using namespace quaver;

namespace {

constexpr int64_t kCacheBytes = int64_t(256) << 20;  // several times the L2 cache
constexpr int kSets = 4;
constexpr double kTurnMs = 2.0;
constexpr int kMostCalls = 50;

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) fail(what, ": ", cudaGetErrorString(status));
}

// Memory that a kernel reads or writes: normal values, or `bytes` where they are given.
struct Operand {
  DType type = DType::f32;
  int64_t rows = 1, cols = 1;
  float deviation = 0.0f;  // 0: zeros
  std::vector<char> bytes;
  bool scratch = false;  // what a call leaves there means nothing

  int64_t size() const { return bytes.empty() ? rows * cols * size_of(type) : bytes.size(); }
};

template <class T>
Operand constant(const std::vector<T>& values) {
  Operand o;
  o.cols = static_cast<int64_t>(values.size());
  const auto* first = reinterpret_cast<const char*>(values.data());
  o.bytes.assign(first, first + values.size() * sizeof(T));
  return o;
}

Operand workspace(int64_t bytes) {
  Operand o = constant(std::vector<char>(bytes));
  o.scratch = true;
  return o;
}

void put(char* to, DType type, float x) {
  switch (type) {
    case DType::f32: *reinterpret_cast<float*>(to) = x; break;
    case DType::f16: *reinterpret_cast<f16*>(to) = encode_nearest<f16>(x); break;
    case DType::bf16: *reinterpret_cast<bf16*>(to) = encode_nearest<bf16>(x); break;
    case DType::e4m3: *reinterpret_cast<e4m3*>(to) = encode_nearest<e4m3>(x); break;
    case DType::e5m2: *reinterpret_cast<e5m2*>(to) = encode_nearest<e5m2>(x); break;
  }
}

// The first contents of an operand. A million normal values, again and again: enough for kernels
// that do not look back.
std::vector<char> contents(const Operand& o, uint64_t seed) {
  if (!o.bytes.empty()) return o.bytes;
  std::vector<char> result(o.size());
  if (o.deviation == 0.0f) return result;
  const int64_t size = size_of(o.type), n = std::min<int64_t>(o.rows * o.cols, 1 << 20);
  for (int64_t i = 0; i < n; ++i) {
    const double u = (random_bits(seed, 2 * i) + 0.5) / 4294967296.0;
    const double v = random_bits(seed, 2 * i + 1) / 4294967296.0;
    const double normal = std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * v);
    put(result.data() + i * size, o.type, o.deviation * static_cast<float>(normal));
  }
  for (int64_t at = n * size; at < o.size(); at += n * size)
    std::memcpy(result.data() + at, result.data(), std::min(n * size, o.size() - at));
  return result;
}

using Views = std::vector<TensorView>;

struct Kernel {
  const char* name;
  const char* target;  // of bench/targets.py, or empty
  int64_t bytes;       // that an element moves
  std::function<std::vector<Operand>(int64_t rows, int64_t cols)> operands;
  std::function<void(const Views&)> on_cpu;
  std::function<void(const Views&, void* stream)> on_cuda;
};

Operand values(DType type, int64_t rows, int64_t cols, float deviation) {
  return {type, rows, cols, deviation, {}, false};
}

// x, q, scale, amax, workspace; and qt where `both`
std::vector<Operand> cast_operands(int64_t rows, int64_t cols, bool both) {
  std::vector<Operand> all = {values(DType::bf16, rows, cols, 1.0f),
                              values(DType::e4m3, rows, cols, 0.0f),
                              constant<float>({1.0f / 64.0f}), constant<float>({0.0f}),
                              workspace(cuda::cast_workspace_bytes(rows, cols))};
  if (both) all.push_back(values(DType::e4m3, cols, rows, 0.0f));
  return all;
}

ScaleSource given() { return {true, nullptr}; }

// The scale of a cast on the device, of cast_operands.
ScaleSource on_device(const Views& v, bool is_given) {
  return {is_given, nullptr, false, v[4].data};
}

// weight, exp_avg, exp_avg_sq, grad, fp8, fp8_t, [scale, amax] of each state and the copy's scale,
// grad_amax, step, hyper, skipped, workspace
std::vector<Operand> adam_operands(int64_t rows, int64_t cols) {
  std::vector<Operand> all = {
      values(DType::f16, rows, cols, 1000.0f), values(DType::e4m3, rows, cols, 1.0f),
      values(DType::f16, rows, cols, 0.0f),    values(DType::bf16, rows, cols, 1.0f),
      values(DType::e4m3, rows, cols, 0.0f),   values(DType::e4m3, cols, rows, 0.0f)};
  all.push_back(constant<float>({0x1p-15f, 1.0f, 0x1p-6f, 1.0f, 1.0f, 1.0f, 1.0f}));
  all.push_back(constant<float>({8.0f}));
  all.push_back(constant<int64_t>({0}));
  all.push_back(constant<double>({1e-4, 0.9, 0.95, 1e-8, 0.1}));
  all.push_back(constant<int64_t>({0}));
  const AdamParameter plain;
  all.push_back(workspace(cuda::adam_workspace_bytes(&plain, 1)));
  return all;
}

AdamParameter adam_parameter(const Views& v) {
  AdamParameter p;
  auto* scales = v[6].as<float>();
  p.weight = {v[0], scales, scales + 1};
  p.exp_avg = {v[1], scales + 2, scales + 3};
  p.exp_avg_sq = {v[2], scales + 4, scales + 5};
  p.grad = v[3];
  p.grad_amax = v[7].as<float>();
  p.fp8 = v[4];
  p.fp8_t = v[5];
  p.fp8_scale = scales + 6;
  p.step = v[8].as<int64_t>();
  p.hyper = v[9].as<double>();
  return p;
}

ScaledView grad_view(const Views& v) { return {v[0], v[1].as<float>(), nullptr}; }

std::vector<Kernel> kernels() {
  std::vector<Kernel> all;
  all.push_back({"quantize bf16, given scale", "cast", 3,
                 [](int64_t rows, int64_t cols) { return cast_operands(rows, cols, false); },
                 [](const Views& v) { cpu::quantize(v[1], v[2], v[3], v[0], {}, given()); },
                 [](const Views& v, void* stream) {
                   cuda::quantize(v[1], v[2], v[3], v[0], {}, on_device(v, true), stream);
                 }});
  all.push_back(
      {"cast_transpose bf16, given scale", "cast-transpose", 4,
       [](int64_t rows, int64_t cols) { return cast_operands(rows, cols, true); },
       [](const Views& v) { cpu::cast_transpose(v[1], v[5], v[2], v[3], v[0], true, given()); },
       [](const Views& v, void* stream) {
         cuda::cast_transpose(v[1], v[5], v[2], v[3], v[0], true, on_device(v, true), stream);
       }});
  all.push_back(
      {"cast_transpose bf16, just in time", "", 6,
       [](int64_t rows, int64_t cols) { return cast_operands(rows, cols, true); },
       [](const Views& v) { cpu::cast_transpose(v[1], v[5], v[2], v[3], v[0], true, {}); },
       [](const Views& v, void* stream) {
         cuda::cast_transpose(v[1], v[5], v[2], v[3], v[0], true, on_device(v, false), stream);
       }});
  all.push_back(
      {"dequantize e4m3 to bf16", "", 3,
       [](int64_t rows, int64_t cols) {
         return std::vector<Operand>{values(DType::bf16, rows, cols, 0.0f),
                                     values(DType::e4m3, rows, cols, 50.0f),
                                     constant<float>({1.0f / 64.0f})};
       },
       [](const Views& v) { cpu::dequantize(v[0], v[1], v[2], {}); },
       [](const Views& v, void* stream) { cuda::dequantize(v[0], v[1], v[2], {}, stream); }});
  all.push_back(
      {"grad_norm e4m3", "", 1,
       [](int64_t rows, int64_t cols) {
         Operand grad = values(DType::e4m3, rows, cols, 50.0f);
         const ScaledView g{{nullptr, DType::e4m3, rows, cols}, nullptr, nullptr};
         return std::vector<Operand>{grad, constant<float>({0.5f}), constant<float>({0.0f, 0.0f}),
                                     workspace(cuda::grad_norm_workspace_bytes(&g, 1))};
       },
       [](const Views& v) {
         const ScaledView g = grad_view(v);
         cpu::grad_norm(v[2].as<float>(), v[2].as<float>() + 1, &g, 1);
       },
       [](const Views& v, void* stream) {
         const ScaledView g = grad_view(v);
         cuda::grad_norm(v[2].as<float>(), v[2].as<float>() + 1, &g, 1, v[3].data, stream);
       }});
  all.push_back({"adam_ O2, bf16 gradient, FP8 weights", "adam-copy", 14, adam_operands,
                 [](const Views& v) {
                   const AdamParameter p = adam_parameter(v);
                   cpu::adam(&p, 1, v[10].as<int64_t>());
                 },
                 [](const Views& v, void* stream) {
                   const AdamParameter p = adam_parameter(v);
                   cuda::adam(&p, 1, v[10].as<int64_t>(), v[11].data, stream);
                 }});
  return all;
}

// The operands of one call, on the host or on the device.
class Memory {
 public:
  Memory(const std::vector<Operand>& operands, bool device, uint64_t seed) : device_(device) {
    for (size_t i = 0; i < operands.size(); ++i) {
      const Operand& o = operands[i];
      const std::vector<char> bytes = contents(o, seed + i);
      void* data = nullptr;
      if (device) {
        check(cudaMalloc(&data, bytes.size()), "cudaMalloc");
        check(cudaMemcpy(data, bytes.data(), bytes.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
      } else {
        data = std::aligned_alloc(64, (bytes.size() + 63) / 64 * 64);
        std::memcpy(data, bytes.data(), bytes.size());
      }
      views_.push_back({data, o.type, o.rows, o.cols});
      sizes_.push_back(static_cast<int64_t>(bytes.size()));
    }
  }
  Memory(const Memory&) = delete;
  ~Memory() {
    for (const TensorView& v : views_) device_ ? (void)cudaFree(v.data) : std::free(v.data);
  }
  const Views& views() const { return views_; }
  std::vector<char> read(size_t i) const {
    std::vector<char> bytes(sizes_[i]);
    check(cudaMemcpy(bytes.data(), views_[i].data, bytes.size(), cudaMemcpyDefault), "cudaMemcpy");
    return bytes;
  }

 private:
  bool device_;
  Views views_;
  std::vector<int64_t> sizes_;
};

// Every operand after the call, on both backends. Shapes around the tile and the vector.
bool agrees(const Kernel& k, void* stream) {
  bool good = true;
  for (const auto& [rows, cols] :
       {std::pair<int64_t, int64_t>{1, 1}, {63, 65}, {128, 256}, {130, 400}}) {
    const std::vector<Operand> operands = k.operands(rows, cols);
    Memory host(operands, false, 7), device(operands, true, 7);
    k.on_cpu(host.views());
    k.on_cuda(device.views(), stream);
    check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), k.name);
    for (size_t i = 0; i < operands.size(); ++i) {
      if (operands[i].scratch || host.read(i) == device.read(i)) continue;
      std::printf("%s [%lld, %lld]: operand %zu differs from the CPU's\n", k.name,
                  static_cast<long long>(rows), static_cast<long long>(cols), i);
      good = false;
    }
  }
  std::printf("%-40s %s\n", k.name, good ? "as on the CPU" : "DIFFERS");
  return good;
}

struct Events {
  cudaEvent_t begin, end;
  Events() {
    check(cudaEventCreate(&begin), "cudaEventCreate");
    check(cudaEventCreate(&end), "cudaEventCreate");
  }
};

using Call = std::function<void(int turn)>;

// Seconds of one call. What is queued before the first event keeps the device busy until the host
// has queued the rest.
double seconds(const Call& call, int calls, void* lead, cudaStream_t stream) {
  static Events events;
  static int turn = 0;
  for (int i = 0; i < 4; ++i)
    check(cudaMemsetAsync(lead, i, kCacheBytes, stream), "cudaMemsetAsync");
  check(cudaEventRecord(events.begin, stream), "cudaEventRecord");
  for (int i = 0; i < calls; ++i) call(turn++);
  check(cudaEventRecord(events.end, stream), "cudaEventRecord");
  check(cudaEventSynchronize(events.end), "cudaEventSynchronize");
  float ms = 0.0f;
  check(cudaEventElapsedTime(&ms, events.begin, events.end), "cudaEventElapsedTime");
  return ms / 1e3 / calls;
}

double quantile(std::vector<double> x, double at) {
  std::sort(x.begin(), x.end());
  const double place = at * double(x.size() - 1);
  const auto low = static_cast<size_t>(place);
  const size_t high = std::min(low + 1, x.size() - 1);
  return x[low] + (x[high] - x[low]) * (place - double(low));
}

std::string heading(const Kernel& k) {
  std::string text =
      std::string("{\"name\": \"") + k.name + "\", \"baseline\": \"a copy of the same bytes\"";
  if (*k.target) text += std::string(", \"target\": \"") + k.target + "\"";
  return text;
}

// One row as JSON.
std::string measure(const Kernel& k, int64_t rows, int64_t cols, int pairs, cudaStream_t stream) {
  const int64_t bytes = k.bytes * rows * cols, half = bytes / 2;
  const int sets = static_cast<int>(std::max<int64_t>(kSets, (kCacheBytes + bytes - 1) / bytes));
  std::vector<std::unique_ptr<Memory>> memory, copies;
  const std::vector<Operand> operands = k.operands(rows, cols);
  const Operand buffer = values(DType::e4m3, 1, half, 1.0f);
  for (int s = 0; s < sets; ++s) {
    memory.push_back(std::make_unique<Memory>(operands, true, 100 * s));
    copies.push_back(std::make_unique<Memory>(std::vector<Operand>{buffer, buffer}, true, 100 * s));
  }
  Memory lead({values(DType::e4m3, 1, kCacheBytes, 0.0f)}, true, 0);
  const Call ours = [&](int turn) { k.on_cuda(memory[turn % sets]->views(), stream); };
  const Call copy = [&](int turn) {
    const Views& v = copies[turn % sets]->views();
    check(cudaMemcpyAsync(v[0].data, v[1].data, half, cudaMemcpyDeviceToDevice, stream),
          "cudaMemcpyAsync");
  };
  const auto time = [&](const Call& call, int calls) {
    return seconds(call, calls, lead.views()[0].data, stream);
  };
  time(copy, 3), time(ours, 3);
  const double shorter = std::min(time(copy, sets), time(ours, sets));
  const int calls = std::clamp(static_cast<int>(kTurnMs / 1e3 / shorter), 1, kMostCalls);
  std::vector<double> before, after, ratio;
  for (int pair = 0; pair < pairs; ++pair) {
    double a = 0.0, b = 0.0;
    if (pair % 2 == 0) a = time(copy, calls);
    b = time(ours, calls);
    if (pair % 2 == 1) a = time(copy, calls);
    before.push_back(a), after.push_back(b), ratio.push_back(a / b);
  }
  const double median = quantile(after, 0.5);
  std::ostringstream row;
  row.precision(9);
  row << heading(k) << ", \"ratio\": " << quantile(ratio, 0.5) << ", \"iqr\": ["
      << quantile(ratio, 0.25) << ", " << quantile(ratio, 0.75) << "], \"pairs\": " << pairs
      << ", \"calls\": " << calls << ", \"baseline_s\": " << quantile(before, 0.5)
      << ", \"candidate_s\": " << median << ", \"gb_per_s\": " << double(bytes) / median / 1e9
      << ", \"shape\": [" << rows << ", " << cols << "]}";
  std::printf("%-40s %6.3f x a copy  %9.1f us  %7.0f GB/s\n", k.name, quantile(ratio, 0.5),
              median * 1e6, double(bytes) / median / 1e9);
  std::fflush(stdout);
  return row.str();
}

struct Arguments {
  bool check = false, list = false;
  int pairs = 30;
  std::string json, filter;
};

Arguments parse(int argc, char** argv) {
  Arguments a;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const bool valued = word == "--json" || word == "--pairs";
    QUAVER_CHECK(!valued || i + 1 < argc, "bench_cuda: ", word, " wants a value");
    if (word == "--check")
      a.check = true;
    else if (word == "--list")
      a.list = true;
    else if (word == "--json")
      a.json = argv[++i];
    else if (word == "--pairs")
      a.pairs = std::atoi(argv[++i]);
    else
      a.filter = word;
  }
  QUAVER_CHECK(a.filter.rfind("--", 0) != 0, "bench_cuda: no such flag: ", a.filter);
  QUAVER_CHECK(a.pairs > 0, "bench_cuda: --pairs must be positive, got ", a.pairs);
  return a;
}

int run(const Arguments& a) {
  cudaStream_t stream = nullptr;
  if (!a.list) check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "no CUDA device");
  bool good = true;
  std::string rows;
  for (const Kernel& k : kernels()) {
    if (std::strstr(k.name, a.filter.c_str()) == nullptr) continue;
    if (a.list)
      std::printf("%s}\n", heading(k).c_str());
    else if (a.check)
      good = agrees(k, stream) && good;
    else
      rows += (rows.empty() ? "" : ",\n") + measure(k, 8192, 4096, a.pairs, stream);
    // The rows measured so far are written, in case the rest fails.
    if (!a.json.empty() && !rows.empty())
      std::ofstream(a.json) << "{\"rows\": [\n" << rows << "\n]}\n";
  }
  return good ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
