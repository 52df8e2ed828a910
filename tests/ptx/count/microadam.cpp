// Counts of MicroAdam.
#include "quaver/microadam.h"

#include "count.h"

using namespace quaver;
using namespace quaver::test;

namespace {

constexpr int64_t kWindow = 10, kKept = 41;
constexpr int64_t kRow = kElements / kTopBlock * kKept;

// Error blocks that cross those of 4096 elements take two launches, of which the second reads the
// gradient and the error again.
void count_micro_adam(const char* name, DType type, int64_t error_block) {
  Buffer weight(size_of(type) * kElements), grad(size_of(type) * kElements);
  Buffer index(2 * kWindow * kRow), value(2 * kWindow * kRow), error(kElements / 2);
  Buffer range(4 * error_block_count(kElements, error_block));
  fill_small(&weight, type, kElements, 14);
  fill_small(&grad, type, kElements, 15);
  for (Buffer* b : {&index, &value, &error, &range}) std::memset(b->data(), 0, b->size());
  float grad_amax = 4.0f;
  int64_t step = 0, skipped = 0;
  const double hyper[kMicroHyper] = {1e-3, 0.9, 0.999, 1e-8, 0.0, 0.0};
  MicroAdamParameter p;
  p.weight = values(weight, type);
  p.grad = values(grad, type);
  p.grad_amax = &grad_amax;
  p.index = index.as<int16_t>();
  p.value = value.as<bf16>();
  p.window = kWindow;
  p.row = kRow;
  p.kept = kKept;
  p.error = error.data();
  p.range = range.as<bf16>();
  p.error_block = error_block;
  p.step = &step;
  p.hyper = hyper;
  Buffer workspace(cuda::micro_adam_workspace_bytes(&p, 1));
  const double again = is_inside(error_block) ? 0.0 : double(size_of(type)) + 0.5;
  const double rows = 4.0 * (kWindow + 1) * kKept / kTopBlock;
  const double least = 3.0 * double(size_of(type)) + 1 + 8.0 / double(error_block) + rows + again;
  count(name, least, int(kWindow),
        [&] { cuda::micro_adam(&p, 1, &skipped, workspace.data(), nullptr); });
}

}  // namespace

TEST(micro_adam) {
  count_micro_adam("micro_adam bf16", DType::bf16, 64);
  count_micro_adam("micro_adam f32", DType::f32, 64);
  count_micro_adam("micro_adam bf16, long error blocks", DType::bf16, 100000);
}
