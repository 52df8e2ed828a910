// A test harness in one header, for one executable per file:
//   TEST(name) { CHECK(x > 0); CHECK_EQ(f(x), 3); CHECK_THROWS(f(-1), "must be positive"); }
// Run with an argument to run only the tests whose name contains it. A failed check is shown with
// its values and ends its test; the others still run.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

namespace quaver::test {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Register {
  Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

struct Failure {
  std::string message;
};

template <class... Parts>
[[noreturn]] void fail(const char* file, int line, const Parts&... parts) {
  std::ostringstream message;
  message.precision(9);  // enough to tell any two f32 apart
  message << file << ":" << line << ": ";
  (message << ... << parts);
  throw Failure{message.str()};
}

// int8_t and friends print as numbers, not as characters.
template <class T>
auto show(const T& value) {
  if constexpr (std::is_arithmetic_v<T> || std::is_enum_v<T>) {
    if constexpr (sizeof(T) == 1) {
      return static_cast<int>(value);
    } else {
      return value;
    }
  } else {
    return std::string(value);
  }
}

template <class A, class B>
void check_eq(const char* file, int line, const char* text, const A& a, const B& b) {
  if (!(a == b)) fail(file, line, text, ": ", show(a), " != ", show(b));
}

template <class F>
void check_throws(const char* file, int line, const char* text, F body, const char* wanted) {
  try {
    body();
  } catch (const std::exception& error) {
    if (std::strstr(error.what(), wanted)) return;
    fail(file, line, text, ": the message lacks '", wanted, "': ", error.what());
  }
  fail(file, line, text, ": did not throw");
}

inline int run(const char* filter) {
  int passed = 0, failed = 0;
  for (const Test& test : tests()) {
    if (!std::strstr(test.name, filter)) continue;
    std::string problem;
    try {
      test.body();
    } catch (const Failure& failure) {
      problem = failure.message;
    } catch (const std::exception& error) {
      problem = std::string("threw: ") + error.what();
    }
    problem.empty() ? ++passed : ++failed;
    if (!problem.empty()) std::printf("FAILED %s\n  %s\n", test.name, problem.c_str());
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0 || passed == 0;  // a filter that matches nothing is a mistake
}

}  // namespace quaver::test

#define TEST(name)                                                   \
  static void test_##name();                                         \
  static quaver::test::Register register_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition)                                                               \
  do {                                                                                 \
    if (!(condition)) quaver::test::fail(__FILE__, __LINE__, #condition, " is false"); \
  } while (0)

#define CHECK_EQ(a, b) quaver::test::check_eq(__FILE__, __LINE__, #a " == " #b, a, b)

#define CHECK_THROWS(expression, message) \
  quaver::test::check_throws(__FILE__, __LINE__, #expression, [&] { (void)(expression); }, message)

int main(int argc, char** argv) { return quaver::test::run(argc > 1 ? argv[1] : ""); }
