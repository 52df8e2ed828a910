#include "body.h"

#include <algorithm>
#include <cctype>
#include <cstring>

#include "quaver/check.h"
#include "text.h"

namespace quaver::ptx {

namespace {

uint64_t aligned(uint64_t at, uint64_t to) { return (at + to - 1) / to * to; }

bool starts_label(const std::string& s, size_t at, size_t* end) {
  size_t i = at;
  while (i < s.size() &&
         (std::isalnum(static_cast<unsigned char>(s[i])) || std::strchr("$_%", s[i])))
    ++i;
  *end = i;
  return i > at && i < s.size() && s[i] == ':' && s[i + 1] != ':';
}

}  // namespace

void Body::read(const std::string& s, int line) {
  scopes_.emplace_back();
  for (size_t i = 0; i < s.size();) {
    size_t end = 0;
    if (s[i] == '\n') ++line;
    if (std::isspace(static_cast<unsigned char>(s[i])) || s[i] == ';') {
      ++i;
    } else if (s[i] == '{') {
      scopes_.emplace_back();
      ++i;
    } else if (s[i] == '}') {
      close_scope();
      ++i;
    } else if (starts_label(s, i, &end)) {
      scopes_.back().labels[s.substr(i, end - i)] = static_cast<int>(kernel_.body.size());
      i = end + 1;
    } else {
      end = s.find(';', i);
      if (end == std::string::npos) fail("ptx: line ", line, ": a statement has no end");
      const std::string text = s.substr(i, end - i);
      try {
        text[0] == '.' ? directive(text) : instruction(text, line);
      } catch (const Error& error) {
        fail("ptx: line ", line, ": ", error.what(), ": ", trimmed(text));
      }
      line += static_cast<int>(std::count(text.begin(), text.end(), '\n'));
      i = end + 1;
    }
  }
  close_scope();
}

void Body::directive(const std::string& text) {
  const std::string kind = words(text)[0];
  if (kind == ".reg") return declare_registers(text);
  if (kind == ".shared" || kind == ".local") return declare(text);
  if (kind == ".pragma" || kind == ".loc" || kind == ".file") return;
  fail("unknown directive");
}

void Body::declare(const std::string& text) {
  const Declaration d = declaration(text);
  const bool shared = text.find(".shared") != std::string::npos;
  const bool dynamic = d.is_unsized;
  uint64_t& used = shared ? kernel_.shared_bytes : kernel_.local_bytes;
  const uint64_t at = aligned(used, dynamic ? std::max<uint64_t>(d.align, 1024) : d.align);
  if (dynamic) {
    if (!shared) fail("only shared memory may have no size");
    kernel_.dynamic_shared = at;
  } else {
    used = at + d.bytes;
  }
  symbols_[d.name] = {shared ? Space::shared : Space::local, at, d.bytes};
}

// .reg .b32 %r<7>;   .reg .b16 lo, hi;
void Body::declare_registers(const std::string& text) {
  const std::string kind = words(text).at(1);
  const Type type = type_of(kind.substr(1));
  if (type == Type::none) fail("unknown type of registers ", kind);
  const size_t names = text.find(kind) + kind.size();
  for (const std::string& name : split(text.substr(names))) {
    const size_t bracket = name.find('<');
    const bool many = bracket != std::string::npos;
    const int count = many ? std::stoi(name.substr(bracket + 1)) : 1;
    for (int i = 0; i < count; ++i) {
      const std::string one = many ? name.substr(0, bracket) + std::to_string(i) : name;
      scopes_.back().registers[one] = static_cast<int>(kernel_.registers.size());
      kernel_.registers.push_back(type);
    }
  }
}

int Body::find_register(const std::string& name) const {
  for (size_t i = scopes_.size(); i-- > 0;) {
    const auto found = scopes_[i].registers.find(name);
    if (found != scopes_[i].registers.end()) return found->second;
  }
  return -1;
}

void Body::instruction(std::string text, int line) {
  Statement s;
  s.line = line;
  s.text = text = trimmed(text);
  if (text[0] == '@') {
    const size_t end = text.find_first_of(" \t\n");
    s.guard_negated = text[1] == '!';
    const std::string name = text.substr(1 + s.guard_negated, end - 1 - s.guard_negated);
    s.guard = find_register(name);
    if (s.guard < 0) fail("unknown predicate ", name);
    text = trimmed(text.substr(end));
  }
  const size_t end = text.find_first_of(" \t\n");
  const std::string opcode = text.substr(0, end);
  for (size_t first = 0; first <= opcode.size();) {
    const size_t dot = std::min(opcode.find('.', first), opcode.size());
    s.opcode.push_back(opcode.substr(first, dot - first));
    first = dot + 1;
  }
  const bool branch = s.opcode[0] == "bra";
  if (end != std::string::npos)
    for (const std::string& part : split(text.substr(end)))
      s.operands.push_back(operand(part, branch));
  if (branch) scopes_.back().branches.push_back(static_cast<int>(kernel_.body.size()));
  kernel_.body.push_back(std::move(s));
}

Operand Body::operand(const std::string& s, bool may_be_label) {
  Operand o;
  if (s == "_") return o;
  if (s[0] == '[') return memory(s);
  if (s[0] == '!') {
    o = operand(trimmed(s.substr(1)), false);
    o.negated = true;
    return o;
  }
  const size_t bar = s.find('|');
  if (s[0] == '{' || bar != std::string::npos) {
    o.kind = Operand::Kind::vector;
    const std::vector<std::string> parts =
        s[0] == '{' ? split(s.substr(1, closing(s, 0) - 1)) : split(s, '|');
    for (const std::string& part : parts) o.parts.push_back(operand(part, false));
    return o;
  }
  o.reg = find_register(s);
  const auto symbol = symbols_.find(s);
  o.name = s;
  if (o.reg >= 0) {
    o.kind = Operand::Kind::reg;
  } else if (symbol != symbols_.end()) {
    o.kind = Operand::Kind::symbol;
    o.space = symbol->second.space;
    o.value = symbol->second.address;
  } else if (is_number(s)) {
    o.kind = Operand::Kind::immediate;
    o.value = number(s);
  } else if (s[0] == '%') {
    o.kind = Operand::Kind::special;
  } else if (may_be_label) {
    o.kind = Operand::Kind::label;
  } else {
    fail("unknown operand ", s);
  }
  return o;
}

// [base], [base+16], [base, {coordinates}]
Operand Body::memory(const std::string& s) {
  Operand o;
  o.kind = Operand::Kind::memory;
  const std::vector<std::string> parts = split(s.substr(1, closing(s, 0) - 1));
  const size_t plus = parts.at(0).find('+');
  o.parts.push_back(operand(trimmed(parts[0].substr(0, plus)), false));
  if (plus != std::string::npos) o.value = number(trimmed(parts[0].substr(plus + 1)));
  for (size_t i = 1; i < parts.size(); ++i) o.parts.push_back(operand(parts[i], false));
  return o;
}

void Body::close_scope() {
  if (scopes_.empty()) fail("ptx: a bracket is closed that was never opened");
  Scope scope = std::move(scopes_.back());
  scopes_.pop_back();
  for (const int branch : scope.branches) {
    Statement& s = kernel_.body[branch];
    const auto found = scope.labels.find(s.operands.at(0).name);
    if (found != scope.labels.end())
      s.target = found->second;
    else if (scopes_.empty())
      fail("ptx: line ", s.line, ": unknown label: ", s.text);
    else
      scopes_.back().branches.push_back(branch);
  }
}

}  // namespace quaver::ptx
