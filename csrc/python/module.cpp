// quaver._C: host-side facts only. Importing it loads libquaver.so, which registers
// torch.ops.quaver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cctype>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "quaver/check.h"
#include "quaver/cpu.h"
#include "quaver/gemm_choice.h"
#include "quaver/gemm_table.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& names) {
  std::vector<std::string> parts;
  std::istringstream stream(names);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

std::vector<std::string> available_isas() {
  int count = 0;
  const char* const* names = quaver::cpu::available_isas(&count);
  return {names, names + count};
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

py::object text_or_none(const char* text) { return *text ? py::object(py::str(text)) : py::none(); }

py::dict build_info() {
  constexpr unsigned long long target = QUAVER_TORCH_TARGET;
  py::dict info;
  info["version"] = QUAVER_VERSION;
  info["torch_target"] = std::to_string(target >> 56) + "." + std::to_string(target >> 48 & 255);
  info["torch_compiled"] = QUAVER_TORCH_VERSION;
  info["cuda"] = *QUAVER_ARCHS != '\0';
  info["cuda_archs"] = split(QUAVER_ARCHS);
  info["cuda_runtime"] = text_or_none(QUAVER_CUDA_RUNTIME);
  info["cpu_isa"] = quaver::cpu::isa();
  info["cpu_isas_available"] = available_isas();
  info["cpu_isas_compiled"] = split(QUAVER_ISAS);
  info["compiler"] = compiler();
  info["cutlass"] = text_or_none(QUAVER_CUTLASS);
  info["nccl"] = py::none();
  return info;
}

// pybind11 calls set_error() of such an exception, whichever library threw it.
struct OutOfMemory final : py::builtin_exception {
  using py::builtin_exception::builtin_exception;
  void set_error() const override {
    const py::object type = py::module_::import("torch").attr("OutOfMemoryError");
    PyErr_SetString(type.ptr(), what());
  }
};

quaver::DType dtype_of(const std::string& name) {
  using quaver::DType;
  for (DType t : {DType::f32, DType::f16, DType::bf16, DType::e4m3, DType::e5m2})
    if (name == quaver::name_of(t)) return t;
  throw std::invalid_argument("unknown format '" + name +
                              "'; formats are f32, f16, bf16, e4m3, e5m2");
}

quaver::GemmScales scales_of(const std::string& name) {
  using quaver::GemmScales;
  for (const auto& [scales, known] : {std::pair{GemmScales::outer, "outer"},
                                      {GemmScales::tiles, "tiles"},
                                      {GemmScales::blocks, "blocks"}})
    if (name == known) return scales;
  throw std::invalid_argument("unknown scales '" + name + "'; they are outer, tiles or blocks");
}

// Of the name of an architecture, such as sm_89 or 89.
bool is_hopper(const std::string& arch) {
  const std::string number = arch.compare(0, 3, "sm_") == 0 ? arch.substr(3) : arch;
  size_t digits = 0;
  while (digits < number.size() && std::isdigit(static_cast<unsigned char>(number[digits])))
    ++digits;
  const int value = digits == 2 || digits == 3 ? std::stoi(number.substr(0, digits)) : 0;
  if (!quaver::multiplies_fp8(value / 10, value % 10))
    throw std::invalid_argument("gemm: no kernel multiplies FP8 on '" + arch +
                                "': they are for sm_89 and newer; older GPUs decode and multiply");
  return value / 10 == 9;
}

py::dict as_dict(const quaver::GemmCandidate& c) {
  const quaver::GemmTactic& t = *c.tactic;
  py::dict d;
  d["name"] = t.name;
  const bool warps = t.schedule == quaver::GemmSchedule::warps;
  d["tile"] = std::vector<int>{t.tile_m, t.tile_n, warps ? 64 : quaver::kGemmTileK};
  d["cluster"] = std::vector<int>{t.cluster_m, t.cluster_n};
  d["schedule"] = warps                                          ? "warps"
                  : t.schedule == quaver::GemmSchedule::pingpong ? "pingpong"
                                                                 : "cooperative";
  d["scheduler"] = t.scheduler == quaver::GemmScheduler::stream_k ? "stream_k" : "persistent";
  d["fast"] = t.fast;
  d["swizzle"] = c.launch.swizzle;
  d["along"] = c.launch.along_m ? "m" : "n";
  d["splits"] = c.launch.splits;
  d["tiles"] = c.tiles;
  d["waves"] = c.waves;
  d["efficiency"] = c.efficiency;
  d["workspace_bytes"] = c.workspace_bytes;
  return d;
}

// A product's keys as Python writes them (python/quaver/gemm_table.py).
quaver::GemmProblem problem_of(const py::dict& product) {
  quaver::GemmProblem p;
  p.m = product["m"].cast<int64_t>();
  p.n = product["n"].cast<int64_t>();
  p.k = product["k"].cast<int64_t>();
  p.a = dtype_of(product["a"].cast<std::string>());
  p.b = dtype_of(product["b"].cast<std::string>());
  p.out = dtype_of(product["out"].cast<std::string>());
  p.accumulate = product["accumulate"].cast<bool>();
  p.fast_accumulate = product["fast_accumulate"].cast<bool>();
  p.scales = scales_of(product["scales"].cast<std::string>());
  p.hopper = is_hopper(product["arch"].cast<std::string>());
  p.aligned = p.n % quaver::kGemmAlignment == 0 && p.k % quaver::kGemmAlignment == 0;
  return p;
}

py::tuple gemm_candidates(const py::dict& product, int sm_count) {
  const quaver::GemmProblem p = problem_of(product);
  const auto found = quaver::gemm_candidates(p, sm_count);
  py::list candidates;
  for (const auto& candidate : found) candidates.append(as_dict(candidate));
  return py::make_tuple(candidates, quaver::explain_gemm(p, found));
}

std::string choose_gemm(const py::dict& product, int sm_count) {
  return quaver::choose_gemm(problem_of(product), sm_count).tactic->name;
}

void set_gemm_table(const std::vector<std::pair<py::dict, std::string>>& rows) {
  std::vector<quaver::MeasuredGemm> table;
  for (const auto& [product, tactic] : rows) table.push_back({problem_of(product), tactic});
  quaver::set_gemm_table(table);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  quaver::set_out_of_memory([](const char* reason) { throw OutOfMemory(reason); });
  m.def("build_info", build_info, "What this build is made of and which CPU code it runs.");
  m.def("available_isas", available_isas, "CPU instruction sets that can run here, best first.");
  m.def("cpu_isa", [] { return std::string(quaver::cpu::isa()); }, "The CPU code in use.");
  m.def(
      "set_cpu_isa", [](const std::string& name) { quaver::cpu::set_isa(name.c_str()); },
      py::arg("name"), "Choose the CPU code by name; every choice gives the same bits.");
  m.def(
      "set_sm_margin", [](int count) { quaver::set_sm_margin(count); }, py::arg("count"),
      "The multiprocessors that Hopper's products leave free.");
  m.def(
      "sm_margin", [] { return quaver::sm_margin(); },
      "The multiprocessors that Hopper's products leave free.");
  m.def("gemm_candidates", gemm_candidates, py::arg("product"), py::arg("sm_count") = 132,
        "The kernels of a GPU that can serve a matrix product, best first by the model, and why "
        "the first one is. Needs no GPU.");
  m.def("choose_gemm", choose_gemm, py::arg("product"), py::arg("sm_count") = 132,
        "The kernel that will run: the measured one, else the model's first. Needs no GPU.");
  m.def("set_gemm_table", set_gemm_table, py::arg("rows"),
        "Replace the measured choices: pairs of a product and a kernel's name.");
}
