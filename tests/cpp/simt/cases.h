// Helpers of the CUDA kernels' tests: buffers with guards, awkward values, every order.
#pragma once

#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "quaver/fp8.h"
#include "quaver/philox.h"
#include "quaver/scale.h"
#include "quaver/tensor_view.h"
#include "simt.h"
#include "test.h"

namespace quaver::test {

// Memory that starts `skew` bytes behind a 16-byte boundary, between two guards. Filled with a
// pattern, so that an element that a kernel forgets differs from one that the CPU wrote.
class Buffer {
 public:
  Buffer(int64_t bytes, int64_t skew = 0, unsigned char pattern = 0xcd)
      : skew_(skew), bytes_(bytes), memory_(bytes + skew + 2 * kGuard + 16, kPattern) {
    for (int64_t i = 0; i < bytes; ++i) data()[i] = pattern;
    if (simt::narrow) simt::narrow(data(), static_cast<size_t>(bytes));
  }
  unsigned char* data() {
    const auto start = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + ((start + 15) / 16 * 16 - start) + kGuard + skew_;
  }
  template <class T> T* as() { return reinterpret_cast<T*>(data()); }
  int64_t size() const { return bytes_; }
  std::vector<unsigned char> bytes() { return {data(), data() + bytes_}; }
  bool guards_hold() {
    const unsigned char* first = data();
    for (const unsigned char& b : memory_)
      if ((&b < first || &b >= first + bytes_) && b != kPattern) return false;
    return true;
  }

 private:
  static constexpr int64_t kGuard = 64;
  static constexpr unsigned char kPattern = 0xa5;
  int64_t skew_, bytes_;
  std::vector<unsigned char> memory_;
};

// Random signs, magnitudes over some 30 binades, a few zeros and subnormals; stored as `type`.
inline void fill(Buffer* to, DType type, int64_t n, uint64_t seed) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = random_bits(seed, static_cast<uint64_t>(i));
    float x = bit_cast<float>((bits & 0x807fffffu) | (112 + bits % 30) << 23);
    if (bits % 97 == 0) x = 0.0f;
    if (bits % 101 == 0) x = bit_cast<float>(bits & 0x807fffffu);
    if (type == DType::f32) to->as<float>()[i] = x;
    if (type == DType::f16) to->as<f16>()[i] = encode_nearest<f16>(x);
    if (type == DType::bf16) to->as<bf16>()[i] = encode_nearest<bf16>(x);
    if (type == DType::e4m3) to->as<e4m3>()[i] = encode_nearest<e4m3>(x);
    if (type == DType::e5m2) to->as<e5m2>()[i] = encode_nearest<e5m2>(x);
  }
}

inline TensorView view(Buffer& b, DType type, int64_t rows, int64_t cols) {
  return TensorView{b.data(), type, rows, cols};
}

inline TensorView view(std::vector<float>& v) {
  return TensorView{v.data(), DType::f32, 1, static_cast<int64_t>(v.size())};
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) {
    return bit_cast<uint32_t>(x) == bit_cast<uint32_t>(y);
  });
}

// The same bits, but that of NaN any will do: a GPU's arithmetic gives one NaN, a CPU's keeps the
// bits of the NaN that came in.
inline bool same_values(Buffer& a, Buffer& b, DType type) {
  const int64_t size = size_of(type);
  for (int64_t i = 0; i < a.size() / size; ++i) {
    if (!std::memcmp(a.data() + i * size, b.data() + i * size, size)) continue;
    if (type != DType::f32) return false;  // encoding makes one NaN everywhere
    const float x = a.as<float>()[i], y = b.as<float>()[i];
    if (x == x || y == y) return false;
  }
  return a.size() == b.size();
}

// Makes the forecast of a history wrong by a factor.
inline void rescale(std::vector<float>* history, float factor) {
  for (size_t i = 1; i < history->size(); ++i) (*history)[i] *= factor;
}

// A kernel whose result depends on the order of threads or blocks lacks a barrier or an atomic.
inline void in_every_order(const std::function<void()>& body) {
  for (const auto order :
       {simt::Order::ascending, simt::Order::descending, simt::Order::shuffled}) {
    simt::set_order(order);
    body();
  }
  simt::set_order(simt::Order::ascending);
}

struct Shape {
  int64_t rows, cols;
};

// Around the vector (16), the warp (512), the block (4096) and the tile (128), odd and empty ones.
inline const std::vector<Shape> kShapes = {
    {0, 0},   {1, 0},   {0, 5},    {1, 1},    {1, 7},     {7, 1},    {1, 16},   {16, 1},
    {3, 63},  {2, 64},  {5, 65},   {47, 31},  {64, 64},   {65, 129}, {128, 48}, {130, 16},
    {1, 511}, {2, 513}, {3, 4096}, {1, 4113}, {1000, 33}, {33, 1000}};

}  // namespace quaver::test
