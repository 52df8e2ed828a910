#include "quaver/rotate.h"

#include <cstring>

#include "parallel.h"
#include "simd_rotate.h"

namespace quaver::cpu {

void rotate(const Rotation& r) {
  check_rotation(r);
  const int64_t size = size_of(r.dtype), bytes = r.head_dim * size, heads = r.heads();
  if (r.numel() == 0) return;
  auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / r.length, position = row % r.length;
      const float *cos = r.cos + position * r.head_dim, *sin = r.sin + position * r.head_dim;
      auto* out = static_cast<char*>(r.out) + row * heads * bytes;
      int64_t head = 0;
      for (int k = 0; k < r.parts; ++k) {
        const HeadsView& part = r.part[k];
        const char* from = static_cast<const char*>(part.data) +
                           (b * part.batch_stride + position * part.row_stride) * size;
        for (int64_t h = 0; h < part.heads;
             ++h, ++head, out += bytes, from += part.head_stride * size)
          if (head < r.turned)
            rotate_simd().rotate(out, from, r.dtype, cos, sin, r.head_dim, r.inverse);
          else
            std::memcpy(out, from, static_cast<size_t>(bytes));
      }
    }
  };
  parallel_for(r.batch * r.length, kLightGrain / (heads * r.head_dim), rows);
}

}  // namespace quaver::cpu
