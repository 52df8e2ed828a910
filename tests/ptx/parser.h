// Reads the text of a PTX module. Only kernels that are asked for are parsed.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "program.h"

namespace quaver::ptx {

// A variable that is not a register.
struct Symbol {
  Space space;
  uint64_t address, bytes;
};

class Module {
 public:
  // `name` is what errors call the module.
  Module(std::string name, std::string text);
  std::vector<std::string> kernel_names() const;
  Kernel kernel(const std::string& name) const;
  const std::string& name() const { return name_; }
  // Memory of .global and .const variables.
  const std::vector<std::unique_ptr<std::vector<unsigned char>>>& variables() const {
    return variables_;
  }

 private:
  struct Entry {
    size_t parameters, body;  // where the texts in brackets start
    int line;
  };
  void read_entry(size_t* at);
  void read_variable(const std::string& declaration, int line);
  int line_of(size_t at) const;

  std::string name_, text_;
  std::map<std::string, Entry> entries_;
  std::map<std::string, Symbol> symbols_;
  std::vector<std::string> shared_;  // declarations of the module's shared variables
  std::vector<std::unique_ptr<std::vector<unsigned char>>> variables_;
};

}  // namespace quaver::ptx
