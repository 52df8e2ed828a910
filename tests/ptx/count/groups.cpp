// Counts of the grouped casts: rows of two groups, and a stack of two matrices.
#include "quaver/groups.h"

#include "count.h"

using namespace quaver;
using namespace quaver::test;

namespace {

constexpr int64_t kEnds[] = {128, 256};
constexpr int64_t kGroups = 2, kHeight = kShape.rows / kGroups;

// Of rows there are two reads, as where a group has one scale.
int64_t reads(Grain grain) { return grain == Grain::tensor || grain == Grain::row ? 2 : 1; }

// bf16 to both layouts; q and qt have so many scales.
void count_groups(const char* name, Grain grain, bool stack, bool tiles_t, int64_t scales,
                  int64_t scales_t) {
  const int64_t width = stack ? kHeight : group_columns(kShape.rows, kGroups);
  const int64_t matrices = stack ? kGroups : 1;
  Buffer x(2 * kElements), q(kElements), qt(matrices * kShape.cols * width);
  Buffer scale(4 * scales), scale_t(4 * scales_t);
  fill_small(&x, DType::bf16, kElements, 1);
  GroupedCast c;
  c.x = values(x, DType::bf16);
  c.q = values(q, DType::e4m3);
  c.qt = view(qt, DType::e4m3, matrices * kShape.cols, width);
  c.scale = scale.as<float>();
  c.scale_t = scale_t.as<float>();
  c.grain = grain;
  c.power_of_two = true;
  c.tiles_t = tiles_t;
  c.stack = stack;
  c.ends = kEnds;
  c.groups = kGroups;
  Buffer memory(cuda::cast_groups_workspace_bytes(c));
  c.workspace = memory.data();
  const auto written = double(q.size() + qt.size() + scale.size() + scale_t.size());
  count(name, 2.0 * double(reads(grain)) + written / kElements,
        [&] { cuda::cast_groups(c, nullptr); });
}

constexpr int64_t kBlocks = kShape.cols / kScaleTile;
constexpr int64_t kBlocksT = group_blocks(kShape.rows, kGroups);

}  // namespace

TEST(groups) {
  count_groups("cast_groups bf16, one scale a group", Grain::tensor, false, false, kGroups, 0);
  count_groups("cast_groups bf16, rows", Grain::row, false, false, kShape.rows,
               kGroups * kShape.cols);
  count_groups("cast_groups bf16, blocks", Grain::block, false, false, kShape.rows * kBlocks,
               kShape.cols * kBlocksT);
  count_groups("cast_groups bf16, blocks and tiles", Grain::block, false, true,
               kShape.rows * kBlocks, kBlocks * kBlocksT);
}

TEST(stacks) {
  count_groups("cast_stack bf16, one scale a matrix", Grain::tensor, true, false, kGroups, 0);
  count_groups("cast_stack bf16, rows", Grain::row, true, false, kShape.rows,
               kGroups * kShape.cols);
  count_groups("cast_stack bf16, tiles", Grain::tile, true, false, kGroups * kBlocks,
               kGroups * kBlocks);
}
