// Runs launches of the SIMT tests on PTX: the programs test_cuda_*_ptx are those tests, linked with
// this. QUAVER_PTX_DIR names the folder of .ptx files, else the one that the build filled.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "machine.h"
#include "parser.h"

namespace quaver::simt {
struct Argument;
struct Launch;
}  // namespace quaver::simt

namespace quaver::ptx {

// What one launch did, for those who count.
struct Record {
  std::string kernel;  // demangled, without its parameters
  uint64_t instructions = 0;
  Traffic traffic;
};

// Every launch is added to it, where there is one.
extern std::vector<Record>* records;

class Driver {
 public:
  explicit Driver(const std::string& folder);
  // Runs these blocks, with warps in this order.
  void run(const simt::Launch& launch, const std::vector<int64_t>& blocks,
           const std::vector<int>& warps);
  // Runs a kernel, by its mangled name, with arguments of the sizes that it declares.
  void run(const std::string& kernel, Launch launch, const void* const* arguments);

 private:
  struct Place {
    const Module* module;
    std::string kernel;
  };
  // A kernel that was launched before keeps its program and the memory of its registers.
  struct Ready {
    explicit Ready(Kernel kernel);
    const Program program;
    Machine machine;
  };
  Ready& ready(const void* kernel);
  Ready& ready(const std::string& kernel);

  std::vector<std::unique_ptr<Module>> modules_;
  std::map<std::string, Place> places_;  // by file and plain name
  std::map<const void*, std::unique_ptr<Ready>> ready_;
  std::map<std::string, std::unique_ptr<Ready>> named_;
};

// The one that the tests' launches share.
Driver& shared_driver();

// Arguments where the kernel expects them.
std::vector<unsigned char> pack(const Kernel& kernel, const std::vector<simt::Argument>& arguments);

}  // namespace quaver::ptx
