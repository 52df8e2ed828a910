// What the counts of kernels share. Each file here becomes a program, which prints a line of JSON
// for each of its cases; bench/bench_ptx.py makes figures of them.
#pragma once

#include <cstdio>
#include <cstring>
#include <functional>

#include "driver.h"
#include "simt/fused.h"
#include "test.h"

namespace quaver::test {

constexpr Shape kShape = {256, 512};  // cuts nothing
constexpr int64_t kElements = kShape.rows * kShape.cols;

inline TensorView values(Buffer& b, DType type) { return view(b, type, kShape.rows, kShape.cols); }

inline void print(const ptx::Record& r) {
  const ptx::Traffic& t = r.traffic;
  std::printf("{\"kernel\": \"%s\", \"instructions\": %lu, \"read\": %lu, \"written\": %lu, ",
              r.kernel.c_str(), (unsigned long)r.instructions, (unsigned long)t.read,
              (unsigned long)t.written);
  std::printf("\"sectors\": %lu, \"least_sectors\": %lu, \"passes\": %lu, \"least_passes\": %lu}",
              (unsigned long)t.sectors, (unsigned long)t.least_sectors, (unsigned long)t.passes,
              (unsigned long)t.least_passes);
}

// Prints the launches of `body`, which runs `before` times first. `least` are the bytes an element
// that must be read and written.
inline void count(const char* name, double least, int before, const std::function<void()>& body) {
  for (int i = 0; i < before; ++i) body();
  std::vector<ptx::Record> records;
  ptx::records = &records;
  body();
  ptx::records = nullptr;
  std::printf("{\"name\": \"%s\", \"elements\": %ld, \"least_bytes\": %g, \"launches\": [", name,
              long(kElements), least);
  for (const ptx::Record& r : records) {
    std::printf("%s", &r == records.data() ? "" : ", ");
    print(r);
  }
  std::printf("]}\n");
  std::fflush(stdout);
}

inline void count(const char* name, double least, const std::function<void()>& body) {
  count(name, least, 0, body);
}

// A cast whose forecast is known, after those that were just in time.
inline void count_delayed(const char* name, double least, const std::function<void()>& body) {
  count(name, least, kHistory, body);
}

}  // namespace quaver::test
