#include "parser.h"

#include <algorithm>
#include <cstring>

#include "body.h"
#include "quaver/check.h"
#include "text.h"

namespace quaver::ptx {

namespace {

struct TypeName {
  const char* name;
  Type type;
  int bytes;
};

constexpr TypeName kTypes[] = {
    {"pred", Type::pred, 0},     {"b8", Type::b8, 1},         {"u8", Type::u8, 1},
    {"s8", Type::s8, 1},         {"b16", Type::b16, 2},       {"u16", Type::u16, 2},
    {"s16", Type::s16, 2},       {"f16", Type::f16, 2},       {"bf16", Type::bf16, 2},
    {"b32", Type::b32, 4},       {"u32", Type::u32, 4},       {"s32", Type::s32, 4},
    {"f32", Type::f32, 4},       {"f16x2", Type::f16x2, 4},   {"bf16x2", Type::bf16x2, 4},
    {"e4m3x2", Type::e4m3x2, 2}, {"e5m2x2", Type::e5m2x2, 2}, {"b64", Type::b64, 8},
    {"u64", Type::u64, 8},       {"s64", Type::s64, 8},       {"f64", Type::f64, 8}};

constexpr size_t kVariableAlign = 128;

}  // namespace

int size_of(Type type) {
  for (const TypeName& t : kTypes)
    if (t.type == type) return t.bytes;
  fail("ptx: an instruction lacks a type");
}

bool is_signed(Type t) {
  return t == Type::s8 || t == Type::s16 || t == Type::s32 || t == Type::s64;
}

Type type_of(const std::string& name) {
  for (const TypeName& t : kTypes)
    if (name == t.name) return t.type;
  return Type::none;
}

bool Statement::has(const char* modifier) const {
  return std::find(opcode.begin() + 1, opcode.end(), modifier) != opcode.end();
}

Module::Module(std::string name, std::string text)
    : name_(std::move(name)), text_(without_comments(std::move(text))) {
  static const char* const kIgnored[] = {".version", ".target", ".address_size", ".file"};
  for (size_t i = 0; i < text_.size();) {
    i = text_.find_first_not_of(" \t\r\n;", i);
    if (i == std::string::npos) break;
    const size_t line_end = std::min(text_.find('\n', i), text_.size());
    const std::string line = text_.substr(i, line_end - i);
    const bool ignored = std::any_of(std::begin(kIgnored), std::end(kIgnored), [&](const char* d) {
      return line.compare(0, std::strlen(d), d) == 0;
    });
    if (ignored) {
      i = line_end;
    } else if (line.find(".entry") != std::string::npos) {
      read_entry(&i);
    } else if (line[0] == '.' && line.find(".func") == std::string::npos) {
      const size_t end = text_.find(';', i);
      read_variable(text_.substr(i, end - i), line_of(i));
      i = end + 1;
    } else {
      fail("ptx: ", name_, " line ", line_of(i), ": not supported: ", line);
    }
  }
}

int Module::line_of(size_t at) const {
  return 1 + static_cast<int>(std::count(text_.begin(), text_.begin() + at, '\n'));
}

void Module::read_entry(size_t* at) {
  const size_t start = text_.find(".entry", *at) + std::strlen(".entry");
  const size_t open = text_.find('(', start), body = text_.find('{', closing(text_, open));
  entries_[trimmed(text_.substr(start, open - start))] = {open, body, line_of(body)};
  *at = closing(text_, body) + 1;
}

void Module::read_variable(const std::string& text, int line) {
  if (text.find(".shared") != std::string::npos) {
    shared_.push_back(text);
    return;
  }
  const size_t equals = text.find('=');
  const Declaration d = declaration(text.substr(0, equals));
  const bool constant = text.find(".const") != std::string::npos;
  if (!constant && text.find(".global") == std::string::npos)
    fail("ptx: ", name_, " line ", line, ": not supported: ", text);
  variables_.emplace_back(new std::vector<unsigned char>(d.bytes + kVariableAlign));
  unsigned char* memory = variables_.back()->data();
  memory += kVariableAlign - reinterpret_cast<uintptr_t>(memory) % kVariableAlign;
  symbols_[d.name] = {Space::global, reinterpret_cast<uint64_t>(memory), d.bytes};
  if (equals == std::string::npos) return;
  std::string values = trimmed(text.substr(equals + 1));
  if (values[0] == '{') values = values.substr(1, closing(values, 0) - 1);
  const std::vector<std::string> all = split(values);
  const size_t size = all.empty() ? 0 : d.is_array ? d.bytes / all.size() : d.bytes;
  size_t width = 1;  // of the element's type, not of the list: trailing zeros may be left out
  for (const std::string& word : words(text.substr(0, equals)))
    if (type_of(word.substr(1)) != Type::none) width = size_of(type_of(word.substr(1)));
  if (size < width) fail("ptx: ", name_, " line ", line, ": too many values: ", text);
  for (size_t i = 0; i < all.size(); ++i) {
    const unsigned long long bits = number(all[i]);
    std::memcpy(memory + i * width, &bits, width);
  }
}

std::vector<std::string> Module::kernel_names() const {
  std::vector<std::string> names;
  for (const auto& entry : entries_) names.push_back(entry.first);
  return names;
}

Kernel Module::kernel(const std::string& name) const {
  const auto found = entries_.find(name);
  if (found == entries_.end()) fail("ptx: ", name_, " has no kernel ", name);
  Kernel kernel;
  kernel.name = name;
  kernel.line = found->second.line;
  std::map<std::string, Symbol> symbols = symbols_;
  const size_t open = found->second.parameters, body = found->second.body;
  for (const std::string& text : split(text_.substr(open + 1, closing(text_, open) - open - 1))) {
    const Declaration d = declaration(text);
    const uint64_t at = (kernel.parameter_bytes + d.align - 1) / d.align * d.align;
    kernel.parameters.push_back({d.name, at, d.bytes});
    symbols[d.name] = {Space::param, at, d.bytes};
    kernel.parameter_bytes = at + d.bytes;
  }
  Body reader(&kernel, std::move(symbols));
  for (const std::string& text : shared_)
    if (text.find("[]") == std::string::npos) reader.declare(text);
  const size_t end = closing(text_, body);
  try {
    // What has no size starts behind all that has: nvcc declares one such array at most.
    for (const std::string& text : shared_)
      if (text.find("[]") != std::string::npos) reader.declare(text);
    reader.read(text_.substr(body + 1, end - body - 1), found->second.line);
  } catch (const Error& error) {
    fail(error.what(), " (", name_, ", kernel ", name, ")");
  }
  return kernel;
}

}  // namespace quaver::ptx
