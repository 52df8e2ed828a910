// Sums of gradients: every instruction set gives the bits of the portable code.
#include <cmath>

#include "every_isa.h"
#include "quaver/all_reduce.h"
#include "quaver/grad.h"

// All codes by all codes, NaN and infinities among them, of one rank to three.
TEST(sums_of_shards) {
  const int64_t n = 256 * 256, sizes[] = {n};
  for (const DType type : {DType::e4m3, DType::e5m2}) {
    std::vector<uint8_t> shards(3 * n);
    for (int64_t i = 0; i < n; ++i) {
      shards[i] = static_cast<uint8_t>(i);
      shards[n + i] = static_cast<uint8_t>(i / 256);
      shards[2 * n + i] = static_cast<uint8_t>(i / 7);
    }
    for (const DType to : {type, DType::f32})
      for (const int64_t ranks : {1, 2, 3})
        for (const float sum_scale : {0.25f, 0.3f})
          same_everywhere([&](Bytes* bytes) {
            std::vector<uint8_t> out(n * size_of(to));
            const float scale = 0.125f;
            float amax = 0.0f;
            int32_t saturated = 0;
            cpu::reduce_shards(
                view(out.data(), to, 1, n), &amax, &saturated,
                {view(shards.data(), type, ranks, n), 0, sizes, 1, &scale, &sum_scale});
            append(bytes, out);
            append(bytes, std::vector<float>{std::isnan(amax) ? -1.0f : amax});
            append(bytes, std::vector<int32_t>{saturated});
          });
  }
}

TEST(accumulated_gradients) {
  const int64_t n = 256 * 256 - 3;
  for (const DType type : {DType::e4m3, DType::e5m2}) {
    std::vector<uint8_t> a(n), b(n);
    for (int64_t i = 0; i < n; ++i) {
      // Finite: the rest is in `sums_of_shards`.
      a[i] = static_cast<uint8_t>(i) & 0xfb;
      b[i] = static_cast<uint8_t>(i / 256) & 0xfb;
      if (type == DType::e5m2) a[i] &= 0xbf, b[i] &= 0xbf;
    }
    same_everywhere([&](Bytes* bytes) {
      std::vector<uint8_t> target = a;
      float scale = 0.5f, other_scale = 0.0625f, amax = 1.0f;
      ScaledView other;
      other.values = view(b.data(), type, 1, n);
      other.scale = &other_scale;
      cpu::accumulate(view(target.data(), type, 1, n), &scale, &amax, other);
      CHECK(is_finite(amax));
      append(bytes, target);
      append(bytes, std::vector<float>{scale, amax});
    });
  }
}

// Each code alone, as often as a piece has room, and all in turn at every length around a
// register's: exact sums, so that the portable code is right by its definition alone.
TEST(norms_of_codes) {
  for (const DType type : {DType::e4m3, DType::e5m2}) {
    std::vector<uint8_t> codes(kNormPiece + 1);
    auto norm_of = [&](int64_t n) {
      ScaledView g;
      g.values = view(codes.data(), type, 1, n);
      float norm = -1.0f, amax = -1.0f;
      cpu::grad_norm(&norm, &amax, &g, 1);
      return std::vector<float>{std::isnan(norm) ? -1.0f : norm, std::isnan(amax) ? -1.0f : amax};
    };
    same_everywhere([&](Bytes* bytes) {
      for (int code = 0; code < 256; ++code) {
        std::fill(codes.begin(), codes.end(), static_cast<uint8_t>(code));
        for (const int64_t n : {int64_t(64), kNormPiece, kNormPiece + 1}) append(bytes, norm_of(n));
      }
      for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(7 * i) & 0xfb;
      for (int64_t n = 0; n < 200; ++n) append(bytes, norm_of(n));
    });
    const bool narrow = type == DType::e4m3;
    std::fill(codes.begin(), codes.end(), narrow ? 0x7e : 0x7b);
    CHECK_EQ(norm_of(kNormPiece)[0], 128.0f * (narrow ? 448.0f : 57344.0f));
  }
}
