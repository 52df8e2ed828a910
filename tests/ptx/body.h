// Reads the body of one kernel: declarations, labels and instructions, in nested scopes.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "parser.h"

namespace quaver::ptx {

class Body {
 public:
  Body(Kernel* kernel, std::map<std::string, Symbol> symbols)
      : kernel_(*kernel), symbols_(std::move(symbols)) {}
  // `text` lies between the brackets; `line` is the line it starts in.
  void read(const std::string& text, int line);
  // Gives a variable of shared or local memory its place.
  void declare(const std::string& text);

 private:
  struct Scope {
    std::map<std::string, int> registers, labels;
    std::vector<int> branches;  // statements whose label is not found yet
  };
  void directive(const std::string& text);
  void declare_registers(const std::string& text);
  void instruction(std::string text, int line);
  void close_scope();
  Operand operand(const std::string& text, bool may_be_label);
  Operand memory(const std::string& text);
  int find_register(const std::string& name) const;

  Kernel& kernel_;
  std::map<std::string, Symbol> symbols_;
  std::vector<Scope> scopes_;
};

}  // namespace quaver::ptx
