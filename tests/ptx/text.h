// Helpers to cut PTX text.
#pragma once

#include <string>
#include <vector>

namespace quaver::ptx {

std::string trimmed(const std::string& s);
std::vector<std::string> words(const std::string& s);
// Parts between separators that are in no bracket.
std::vector<std::string> split(const std::string& s, char separator = ',');
// The text with comments turned into spaces; lines stay where they are.
std::string without_comments(std::string text);
// Index of the bracket that closes the one at `open`.
size_t closing(const std::string& s, size_t open);
bool is_number(const std::string& s);
// An integer, 0f and 8 or 0d and 16 hexadecimal digits: its bits.
unsigned long long number(const std::string& s);

// .align 8 .b8 name[56]
struct Declaration {
  std::string name;
  unsigned long long align = 0, bytes = 0;
  bool is_array = false, is_unsized = false;
};
Declaration declaration(const std::string& s);

}  // namespace quaver::ptx
