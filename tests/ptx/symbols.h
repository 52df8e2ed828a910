// Names of this program's functions by their addresses, local ones too: how a kernel that was
// compiled for the host is found in PTX.
#pragma once

#include <string>

namespace quaver::ptx {

struct Function {
  std::string file;  // without folder and ending; empty for one that other files may see too
  std::string name;  // mangled
};

// An error where no function starts.
Function function_at(const void* address);

// A mangled name whose anonymous namespaces, which each compiler names after the file, are alike.
std::string plain_name(const std::string& mangled);

}  // namespace quaver::ptx
