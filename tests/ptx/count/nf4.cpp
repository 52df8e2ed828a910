// Counts of NF4.
#include "quaver/nf4.h"

#include "count.h"

using namespace quaver;
using namespace quaver::test;

TEST(nf4) {
  Buffer x(2 * kElements), codes(kElements / 2), absmax(4 * kElements / 64);
  fill_small(&x, DType::bf16, kElements, 8);
  const Nf4View to = {codes.data(), absmax.as<float>(), kElements, 64};
  count("nf4_encode bf16", 2.5 + 4.0 / 64,
        [&] { cuda::nf4_encode(to, values(x, DType::bf16), nullptr); });
  count("nf4_decode to bf16", 2.5 + 4.0 / 64,
        [&] { cuda::nf4_decode(values(x, DType::bf16), to, nullptr); });
}
