#include "symbols.h"

#include <elf.h>
#include <link.h>

#include <cctype>
#include <cstring>
#include <fstream>
#include <unordered_map>
#include <vector>

#include "quaver/check.h"

namespace quaver::ptx {

namespace {

constexpr char kAnonymous[] = "_GLOBAL__N_";

// By how much the program was moved when it was loaded: of the first object, which it is.
uint64_t load_bias() {
  uint64_t bias = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        *static_cast<uint64_t*>(result) = info->dlpi_addr;
        return 1;
      },
      &bias);
  return bias;
}

std::string stem(const std::string& path) {
  const size_t slash = path.rfind('/');
  const std::string name = slash == std::string::npos ? path : path.substr(slash + 1);
  return name.substr(0, name.find('.'));
}

std::unordered_map<uint64_t, Function> read_functions() {
  std::ifstream file("/proc/self/exe", std::ios::binary);
  const std::vector<char> image{std::istreambuf_iterator<char>(file), {}};
  const auto at = [&](uint64_t offset) { return image.data() + offset; };
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(at(0));
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(at(header->e_shoff));
  const uint64_t bias = load_bias();
  std::unordered_map<uint64_t, Function> functions;
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(at(sections[i].sh_offset));
    const char* names = at(sections[sections[i].sh_link].sh_offset);
    std::string file;  // a file's symbol stands before those of its local functions
    for (uint64_t k = 0; k < sections[i].sh_size / sizeof(Elf64_Sym); ++k) {
      const Elf64_Sym& symbol = symbols[k];
      const char* name = names + symbol.st_name;
      const bool local = ELF64_ST_BIND(symbol.st_info) == STB_LOCAL;
      if (ELF64_ST_TYPE(symbol.st_info) == STT_FILE) file = stem(name);
      if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC && symbol.st_value != 0)
        functions[symbol.st_value + bias] = {local ? file : "", name};
    }
  }
  if (functions.empty()) fail("ptx: the program has no symbol table: it must not be stripped");
  return functions;
}

}  // namespace

Function function_at(const void* address) {
  static const auto* functions = new std::unordered_map<uint64_t, Function>(read_functions());
  const auto found = functions->find(reinterpret_cast<uint64_t>(address));
  if (found == functions->end()) fail("ptx: no function starts at ", address);
  return found->second;
}

// Names in a mangled name follow their lengths: 12_GLOBAL__N_1, 30_GLOBAL__N__5fa..._7_adam_cu_...
std::string plain_name(const std::string& s) {
  std::string result;
  for (size_t i = 0; i < s.size();) {
    if (!std::isdigit(static_cast<unsigned char>(s[i]))) {
      result += s[i++];
      continue;
    }
    size_t start = i, length = 0;
    while (std::isdigit(static_cast<unsigned char>(s[start])))
      length = 10 * length + static_cast<size_t>(s[start++] - '0');
    const bool anonymous = s.compare(start, std::strlen(kAnonymous), kAnonymous) == 0;
    if (anonymous) result += "(anonymous)";
    // A number that is no length, as of a template's argument, stands for itself.
    const size_t end = length <= s.size() - start ? start + length : start;
    if (!anonymous) result += s.substr(i, end - i);
    i = end;
  }
  return result;
}

}  // namespace quaver::ptx
