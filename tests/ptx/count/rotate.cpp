// Counts of rotary positions: 64 heads of 128, of which 48 are turned and 16 copied.
#include "quaver/rotate.h"

#include "count.h"

using namespace quaver;
using namespace quaver::test;

TEST(rotate) {
  constexpr int64_t kHeads = 64, kDim = 128, kLength = kElements / kHeads / kDim;
  Buffer x(2 * kElements), out(2 * kElements), cos(4 * kLength * kDim), sin(4 * kLength * kDim);
  fill_small(&x, DType::bf16, kElements, 9);
  for (Buffer* angles : {&cos, &sin}) fill_small(angles, DType::f32, kLength * kDim, 3);
  Rotation r;
  r.dtype = DType::bf16;
  r.batch = 1;
  r.length = kLength;
  r.head_dim = kDim;
  r.part[r.parts++] = {x.data(), kHeads, kElements, kHeads * kDim, kDim};
  r.out = out.data();
  r.cos = cos.as<float>();
  r.sin = sin.as<float>();
  r.turned = kHeads * 3 / 4;
  count("rotate bf16", 4 + 8.0 / kHeads, [&] { cuda::rotate(r, nullptr); });
}
