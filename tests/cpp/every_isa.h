// Runs a body under every instruction set, for tests that they give the same bits.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "quaver/cpu.h"
#include "quaver/philox.h"
#include "quaver/tensor_view.h"
#include "test.h"

using namespace quaver;

using Bytes = std::vector<unsigned char>;

// Runs `body` under every instruction set; what it appends must be what portable code appends.
inline void same_everywhere(const std::function<void(Bytes*)>& body) {
  const std::string before = cpu::isa();
  cpu::set_isa("portable");
  Bytes wanted;
  body(&wanted);
  int count = 0;
  const char* const* names = cpu::available_isas(&count);
  for (int i = 0; i < count; ++i) {
    cpu::set_isa(names[i]);
    Bytes got;
    body(&got);
    if (got != wanted) {
      cpu::set_isa(before.c_str());
      CHECK_EQ(std::string(names[i]), "the same bits as portable");
    }
  }
  cpu::set_isa(before.c_str());
}

template <class T>
inline void append(Bytes* bytes, const std::vector<T>& values) {
  const auto* first = reinterpret_cast<const unsigned char*>(values.data());
  bytes->insert(bytes->end(), first, first + values.size() * sizeof(T));
}

// Random signs, magnitudes over some 30 binades, a few zeros and subnormals.
inline std::vector<float> some_values(int64_t n, uint64_t seed) {
  std::vector<float> values(n);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = random_bits(seed, i);
    const uint32_t exponent = 112 + bits % 30;
    values[i] = bit_cast<float>((bits & 0x807fffffu) | exponent << 23);
    if (bits % 97 == 0) values[i] = 0.0f;
    if (bits % 101 == 0) values[i] = bit_cast<float>(bits & 0x807fffffu);
  }
  return values;
}

inline TensorView view(void* data, DType type, int64_t rows, int64_t cols) {
  return TensorView{data, type, rows, cols};
}
