#include "driver.h"

#include <cxxabi.h>
#include <dirent.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

#include "allocations.h"
#include "decode.h"
#include "quaver/check.h"
#include "simt.h"
#include "symbols.h"

namespace quaver::ptx {

std::vector<Record>* records = nullptr;

namespace {

std::vector<std::string> files_of(const std::string& folder) {
  std::vector<std::string> names;
  DIR* directory = opendir(folder.c_str());
  if (!directory) fail("ptx: cannot read the folder ", folder);
  while (const dirent* entry = readdir(directory)) {
    const std::string name = entry->d_name;
    if (name.size() > 4 && name.substr(name.size() - 4) == ".ptx") names.push_back(name);
  }
  closedir(directory);
  if (names.empty()) fail("ptx: no .ptx file in ", folder);
  std::sort(names.begin(), names.end());
  return names;
}

std::string content(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  if (!file) fail("ptx: cannot read ", path);
  return text.str();
}

// quaver::cuda::(anonymous namespace)::encode_kernel(...) -> encode_kernel
std::string demangled(const std::string& name) {
  int status = 0;
  char* all = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string s = status == 0 ? all : name;
  std::free(all);
  const size_t kernel = s.find("_kernel");
  const size_t start = s.rfind("::", kernel);
  const size_t end = std::min(s.find_first_of("(<", kernel), s.size());
  return start == std::string::npos ? s : s.substr(start + 2, end - start - 2);
}

void interpret(const simt::Launch& launch, const std::vector<int64_t>& blocks,
               const std::vector<int>& warps) {
  const Unregistered own;
  shared_driver().run(launch, blocks, warps);
}

void narrow(const void* data, size_t bytes) { host_memory().narrow(data, bytes); }

// Before main(), and after the interpreter's own zeroes, which are constant.
const bool installed = [] {
  simt::interpreter = interpret;
  simt::narrow = narrow;
  return true;
}();

}  // namespace

Driver& shared_driver() {
  const char* folder = std::getenv("QUAVER_PTX_DIR");
  static auto* driver = new Driver(folder ? folder : QUAVER_PTX_DIR);
  return *driver;
}

Driver::Driver(const std::string& folder) {
  for (const std::string& name : files_of(folder)) {
    modules_.emplace_back(new Module(name, content(folder + "/" + name)));
    const Module& module = *modules_.back();
    for (const auto& variable : module.variables())
      host_memory().add(variable->data(), variable->size());
    for (const std::string& kernel : module.kernel_names()) {
      const std::string plain = ": " + plain_name(kernel);
      const std::string key = name.substr(0, name.size() - 4) + plain;
      if (!places_.insert({key, {&module, kernel}}).second)
        fail("ptx: ", name, " has two kernels ", plain_name(kernel));
      places_.insert({plain, {&module, kernel}});  // of a template several files may have copies
    }
  }
}

Driver::Ready::Ready(Kernel kernel)
    : program(decode(std::move(kernel))), machine(program, host_memory()) {}

Driver::Ready& Driver::ready(const void* kernel) {
  std::unique_ptr<Ready>& known = ready_[kernel];
  if (known) return *known;
  const Function function = function_at(kernel);
  const std::string name = function.file + ": " + plain_name(function.name);
  const auto found = places_.find(name);
  if (found == places_.end()) fail("ptx: no PTX was compiled for the kernel ", name);
  known.reset(new Ready(found->second.module->kernel(found->second.kernel)));
  return *known;
}

Driver::Ready& Driver::ready(const std::string& kernel) {
  std::unique_ptr<Ready>& known = named_[kernel];
  if (known) return *known;
  const auto found = places_.find(": " + plain_name(kernel));
  if (found == places_.end()) fail("ptx: no PTX was compiled for the kernel ", kernel);
  known.reset(new Ready(found->second.module->kernel(found->second.kernel)));
  return *known;
}

void Driver::run(const std::string& kernel, Launch launch, const void* const* arguments) {
  Ready& k = ready(kernel);
  std::vector<simt::Argument> all;
  for (size_t i = 0; i < k.program.kernel.parameters.size(); ++i)
    all.push_back({arguments[i], k.program.kernel.parameters[i].bytes});
  launch.parameters = pack(k.program.kernel, all);
  k.machine.run(launch);
}

void Driver::run(const simt::Launch& launch, const std::vector<int64_t>& blocks,
                 const std::vector<int>& warps) {
  // Warps in a shuffled order take turns too: they meet between barriers as they would by chance.
  constexpr uint64_t kTurn = 61;
  const bool ordered =
      std::is_sorted(warps.begin(), warps.end()) || std::is_sorted(warps.rbegin(), warps.rend());
  Ready& kernel = ready(launch.kernel);
  Launch l;
  l.grid.x = static_cast<uint32_t>(launch.blocks);
  l.threads = launch.threads;
  l.chosen = blocks;
  l.parameters = pack(kernel.program.kernel, launch.arguments);
  l.warps = warps;
  l.turn = ordered ? 0 : kTurn;
  l.timing.cut_sums = simt::control.cut_sums;
  if (!records) return kernel.machine.run(l);
  Record record;
  record.kernel = demangled(kernel.program.kernel.name);
  const uint64_t before = kernel.machine.counts().instructions;
  kernel.machine.traffic = &record.traffic;
  kernel.machine.run(l);
  kernel.machine.traffic = nullptr;
  record.instructions = kernel.machine.counts().instructions - before;
  records->push_back(record);
}

std::vector<unsigned char> pack(const Kernel& kernel,
                                const std::vector<simt::Argument>& arguments) {
  if (arguments.size() != kernel.parameters.size())
    fail("ptx: ", kernel.name, " takes ", kernel.parameters.size(), " arguments, got ",
         arguments.size());
  std::vector<unsigned char> all(kernel.parameter_bytes);
  for (size_t i = 0; i < arguments.size(); ++i) {
    const Parameter& p = kernel.parameters[i];
    if (arguments[i].bytes != p.bytes)
      fail("ptx: argument ", i, " of ", kernel.name, " has ", p.bytes, " bytes, got ",
           arguments[i].bytes);
    std::memcpy(all.data() + p.offset, arguments[i].value, p.bytes);
  }
  return all;
}

}  // namespace quaver::ptx
