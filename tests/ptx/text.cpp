#include "text.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>

#include "program.h"
#include "quaver/check.h"

namespace quaver::ptx {

std::string trimmed(const std::string& s) {
  const char* blank = " \t\r\n";
  const size_t first = s.find_first_not_of(blank);
  if (first == std::string::npos) return "";
  return s.substr(first, s.find_last_not_of(blank) - first + 1);
}

std::vector<std::string> words(const std::string& s) {
  std::vector<std::string> result;
  for (size_t i = 0; i < s.size();) {
    while (i < s.size() && std::isspace(static_cast<unsigned char>(s[i]))) ++i;
    const size_t first = i;
    while (i < s.size() && !std::isspace(static_cast<unsigned char>(s[i]))) ++i;
    if (i > first) result.push_back(s.substr(first, i - first));
  }
  return result;
}

std::vector<std::string> split(const std::string& s, char separator) {
  std::vector<std::string> result;
  int depth = 0;
  size_t first = 0;
  for (size_t i = 0; i <= s.size(); ++i) {
    if (i == s.size() || (s[i] == separator && depth == 0)) {
      const std::string part = trimmed(s.substr(first, i - first));
      if (!part.empty()) result.push_back(part);
      first = i + 1;
    } else if (std::strchr("{[<(", s[i])) {
      ++depth;
    } else if (std::strchr("}]>)", s[i])) {
      --depth;
    }
  }
  return result;
}

std::string without_comments(std::string text) {
  for (size_t i = 0; i + 1 < text.size(); ++i) {
    if (text[i] != '/' || (text[i + 1] != '/' && text[i + 1] != '*')) continue;
    const bool to_line_end = text[i + 1] == '/';
    const size_t found = text.find(to_line_end ? "\n" : "*/", i + 2);
    const size_t end = found == std::string::npos ? text.size() : found + (to_line_end ? 0 : 2);
    for (; i < end; ++i)
      if (text[i] != '\n') text[i] = ' ';
  }
  return text;
}

size_t closing(const std::string& s, size_t open) {
  int depth = 0;
  for (size_t i = open; i < s.size(); ++i) {
    if (std::strchr("{[(", s[i])) ++depth;
    if (std::strchr("}])", s[i]) && --depth == 0) return i;
  }
  fail("ptx: a bracket is never closed: ", s.substr(open, 40));
}

bool is_number(const std::string& s) {
  const size_t first = !s.empty() && (s[0] == '-' || s[0] == '+');
  return s.size() > first && std::isdigit(static_cast<unsigned char>(s[first]));
}

unsigned long long number(const std::string& s) {
  char* end = nullptr;
  unsigned long long result = 0;
  if (s.size() > 2 && s[0] == '0' && std::strchr("fFdD", s[1]))
    result = std::strtoull(s.c_str() + 2, &end, 16);
  else if (s[0] == '-')
    result = static_cast<unsigned long long>(std::strtoll(s.c_str(), &end, 0));
  else
    result = std::strtoull(s.c_str(), &end, 0);
  while (*end == 'U' || *end == 'L') ++end;
  if (*end) fail("ptx: not a number: ", s);
  return result;
}

Declaration declaration(const std::string& s) {
  Declaration d;
  unsigned long long size = 0, count = 1;
  const std::vector<std::string> all = words(s);
  for (size_t i = 0; i + 1 < all.size(); ++i) {
    if (all[i] == ".align") d.align = number(all[i + 1]);
    const Type type = all[i][0] == '.' ? type_of(all[i].substr(1)) : Type::none;
    if (type != Type::none) size = static_cast<unsigned long long>(size_of(type));
  }
  d.name = all.empty() ? "" : all.back();
  const size_t bracket = d.name.find('[');
  if (bracket != std::string::npos) {
    d.is_array = true;
    d.is_unsized = d.name[bracket + 1] == ']';
    count = d.is_unsized ? 0 : number(d.name.substr(bracket + 1, d.name.size() - bracket - 2));
    d.name.resize(bracket);
  }
  if (size == 0 || d.name.empty()) fail("ptx: a declaration without a type or a name: ", s);
  d.align = std::max(d.align, size);
  d.bytes = size * count;
  return d;
}

}  // namespace quaver::ptx
