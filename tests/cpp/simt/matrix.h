// csrc/cuda/mma.h on the host: copies land where their thread waits for them, and products are
// summed in f64, rounded once.
#pragma once

#include <deque>
#include <map>
#include <vector>

#include "quaver/fp8.h"
#include "simt.h"

namespace quaver::simt {

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool there;
};

// Of one thread: those of the group that is open, and groups.
struct Copies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

inline Copies& copies_of_thread() {
  static std::map<unsigned, Copies> all;
  return all[thread_index.x];
}

inline void copy_async(void* to, const void* from, int bytes, bool there) {
  copies_of_thread().open.push_back({to, from, bytes, there});
}

inline void commit_copies() {
  Copies& c = copies_of_thread();
  c.groups.push_back(std::move(c.open));
  c.open.clear();
}

inline void wait_copies(int pending) {
  auto& groups = copies_of_thread().groups;
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front())
    for (const Copy& c : groups.front()) {
      std::memset(c.to, 0, static_cast<size_t>(c.bytes));
      if (c.there) std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
    }
}

inline void load_tiles(uint32_t (&to)[4], const void* row) {
  const uint64_t* rows = exchange(0xffffffffu, reinterpret_cast<uint64_t>(row));
  for (int tile = 0; tile < 4; ++tile)
    std::memcpy(&to[tile],
                reinterpret_cast<const char*>(rows[8 * tile + lane() / 4]) + lane() % 4 * 4, 4);
}

template <class T>
inline float value_of(uint32_t word, int byte) {
  return decode(T{static_cast<uint8_t>(word >> 8 * byte)});
}

template <class A, class B>
inline void multiply_tiles(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int g = lane() / 4, c = lane() % 4;
  double total[4] = {sums[0], sums[1], sums[2], sums[3]};
  for (int half = 0; half < 2; ++half) {
    uint64_t of_a[4], of_b[2][4];
    const uint64_t* all = exchange(0xffffffffu, uint64_t(a[2 * half + 1]) << 32 | a[2 * half]);
    for (int i = 0; i < 4; ++i) of_a[i] = all[4 * g + i];
    all = exchange(0xffffffffu, half == 0 ? b0 : b1);
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < 2; ++e) of_b[e][i] = all[4 * (2 * c + e) + i];
    for (int s = 0; s < 4; ++s)
      for (int k = 0; k < 16; ++k)
        total[s] += double(value_of<A>(static_cast<uint32_t>(of_a[k / 4] >> s / 2 * 32), k % 4)) *
                    double(value_of<B>(static_cast<uint32_t>(of_b[s % 2][k / 4]), k % 4));
  }
  for (int s = 0; s < 4; ++s) sums[s] = static_cast<float>(total[s]);
}

}  // namespace quaver::simt
