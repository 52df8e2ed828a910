// quaver._C: host-side facts only. Importing it loads libquaver.so, which registers
// torch.ops.quaver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "quaver/cpu.h"

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
  info["cpu_isa"] = quaver::cpu::isa();
  info["cpu_isas_available"] = available_isas();
  info["cpu_isas_compiled"] = split(QUAVER_ISAS);
  info["compiler"] = compiler();
  info["cutlass"] = text_or_none(QUAVER_CUTLASS);
  info["nccl"] = py::none();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", build_info, "What this build is made of and which CPU code it runs.");
  m.def("available_isas", available_isas, "CPU instruction sets that can run here, best first.");
  m.def("cpu_isa", [] { return std::string(quaver::cpu::isa()); }, "The CPU code in use.");
  m.def(
      "set_cpu_isa", [](const std::string& name) { quaver::cpu::set_isa(name.c_str()); },
      py::arg("name"), "Choose the CPU code by name; every choice gives the same bits.");
}
