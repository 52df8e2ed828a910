// What the matrix products of mma.sync do on the interpreter: shared memory is read and written
// without bank conflicts, and how many instructions go with a product is printed.
#include <cstdio>

#include "driver.h"
#include "gemm_product.h"
#include "simt.h"
#include "test.h"

using namespace quaver;
using namespace quaver::test;

namespace {

ptx::Record record_of(const GemmTactic& t, const ProductCase& c) {
  Product p(t, c);
  std::vector<ptx::Record> records;
  ptx::records = &records;
  p.run([&](const GemmArguments& arguments, const GemmLaunch& launch) {
    cuda::gemm_mma(arguments, p.candidate().index - hopper_tactics(), launch);
  });
  ptx::records = nullptr;
  CHECK_EQ(p.check(), 0);
  CHECK_EQ(records.size(), size_t(1));
  return records.at(0);
}

}  // namespace

TEST(no_bank_conflicts_in_shared_memory) {
  for (const GemmTactic& t : gemm_tactics()) {
    if (t.schedule != GemmSchedule::warps || t.copies != GemmCopies::vectors) continue;
    const ProductShape shape = {256, 256, 256, 2}, longer = {256, 256, 768, 2};
    ProductCase c = {t.name, shape};
    c.hopper = false;
    const ptx::Record r = record_of(t, c);
    CHECK(r.traffic.passes > 0);
    CHECK_EQ(r.traffic.passes, r.traffic.least_passes);
    c.shape = longer;
    // What a longer K adds is the main loop's.
    const double products = double(shape.m) * shape.n * (longer.k - shape.k) / (16 * 8 * 32);
    const double loop = double(record_of(t, c).instructions - r.instructions) / 32 / products;
    std::printf("%-34s %.2f instructions of a warp a product in the main loop\n", t.name, loop);
  }
}
