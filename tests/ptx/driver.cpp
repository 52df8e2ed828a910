#include "driver.h"

#include <dirent.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

#include "allocations.h"
#include "decode.h"
#include "quaver/check.h"
#include "symbols.h"

namespace quaver::ptx {

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

void interpret(const simt::Launch& launch, const std::vector<int64_t>& blocks,
               const std::vector<int>& warps) {
  const Unregistered own;
  const char* folder = std::getenv("QUAVER_PTX_DIR");
  static auto* driver = new Driver(folder ? folder : QUAVER_PTX_DIR);
  driver->run(launch, blocks, warps);
}

void narrow(const void* data, size_t bytes) { host_memory().narrow(data, bytes); }

// Before main(), and after the interpreter's own zeroes, which are constant.
const bool installed = [] {
  simt::interpreter = interpret;
  simt::narrow = narrow;
  return true;
}();

}  // namespace

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

const Program& Driver::program_of(const void* kernel) {
  const auto known = programs_.find(kernel);
  if (known != programs_.end()) return known->second;
  const Function function = function_at(kernel);
  const std::string name = function.file + ": " + plain_name(function.name);
  const auto found = places_.find(name);
  if (found == places_.end()) fail("ptx: no PTX was compiled for the kernel ", name);
  const Place& place = found->second;
  return programs_[kernel] = decode(place.module->kernel(place.kernel));
}

void Driver::run(const simt::Launch& launch, const std::vector<int64_t>& blocks,
                 const std::vector<int>& warps) {
  const Program& program = program_of(launch.kernel);
  Options options;
  options.warps = warps;
  Launch l;
  l.blocks = launch.blocks;
  l.threads = launch.threads;
  l.chosen = blocks;
  l.parameters = pack(program.kernel, launch.arguments);
  Machine(program, host_memory(), options).run(l);
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
