// Counts of what takes the gradients of many tensors: buckets, their sums, norms, accumulation and
// the sums of subsets.
#include "count.h"
#include "quaver/all_reduce.h"
#include "quaver/subset.h"

using namespace quaver;
using namespace quaver::test;

namespace {

constexpr int64_t kRanks = 8;

void count_pack(const char* name, DType from, DType to) {
  Buffer x(size_of(from) * kElements), bucket(size_of(to) * kElements);
  fill(&x, from, kElements, 1);
  const ScaledView tensor = {values(x, from)};
  const float scale = 0.5f;
  Buffer workspace(cuda::pack_workspace_bytes(1));
  count(name, double(size_of(from) + size_of(to)), [&] {
    cuda::pack(values(bucket, to), &tensor, 1, is_fp8(to) ? &scale : nullptr, workspace.data(),
               nullptr);
  });
}

// A result of kElements, of the shards of kRanks.
void count_sum(const char* name, DType type, DType out_type) {
  Buffer shards(kRanks * kElements * size_of(type)), out(kElements * size_of(out_type));
  fill(&shards, type, kRanks * kElements, 5);
  const float scale = 0.5f, sum_scale = 2.0f;
  float amax = 0.0f;
  int32_t saturated = 0;
  ShardedSum sum;
  sum.shards = view(shards, type, kRanks, kElements);
  sum.sizes = &kElements;
  sum.count = 1;
  sum.scales = is_fp8(type) ? &scale : nullptr;
  sum.sum_scales = out_type == DType::f32 ? nullptr : &sum_scale;
  Buffer workspace(cuda::reduce_shards_workspace_bytes(1));
  count(name, double(kRanks * size_of(type) + size_of(out_type)), [&] {
    cuda::reduce_shards(view(out, out_type, 1, kElements), &amax, &saturated, sum, workspace.data(),
                        nullptr);
  });
}

void count_norm(const char* name, DType type) {
  Buffer x(size_of(type) * kElements);
  fill(&x, type, kElements, 1);
  const ScaledView grad = {values(x, type)};
  float norm = 0.0f, amax = 0.0f;
  Buffer workspace(cuda::grad_norm_workspace_bytes(&grad, 1));
  count(name, double(size_of(type)),
        [&] { cuda::grad_norm(&norm, &amax, &grad, 1, workspace.data(), nullptr); });
}

// `reads` of both addends: the scale of an FP8 sum must be known before its first code.
void count_accumulate(const char* name, DType type, DType other_type, int reads) {
  Buffer target(size_of(type) * kElements), other(size_of(other_type) * kElements);
  fill(&target, type, kElements, 1);
  fill(&other, other_type, kElements, 2);
  float scale = 1.0f, amax = 1.0f;
  Buffer workspace(cuda::kAccumulateWorkspaceBytes);
  const double both = double(size_of(type) + size_of(other_type));
  count(name, reads * both + double(size_of(type)), [&] {
    cuda::accumulate(values(target, type), &scale, &amax, {values(other, other_type)},
                     workspace.data(), nullptr);
  });
}

void count_subsets(const char* name, const Subsets& subsets) {
  Buffer x(2 * kElements), sums(4 * subset_count(subsets, kElements));
  fill(&x, DType::bf16, kElements, 1);
  const SubsetGrad grad = {{values(x, DType::bf16)}, subsets, sums.as<float>()};
  float amax = 0.0f;
  Buffer workspace(cuda::subset_sums_workspace_bytes(&grad, 1));
  count(name, 2 + 4 * double(subset_count(subsets, kElements)) / kElements,
        [&] { cuda::subset_sums(&amax, &grad, 1, workspace.data(), nullptr); });
}

}  // namespace

TEST(pack) {
  count_pack("pack f32 to e4m3", DType::f32, DType::e4m3);
  count_pack("pack bf16 to e4m3", DType::bf16, DType::e4m3);
  count_pack("pack e4m3 to e4m3", DType::e4m3, DType::e4m3);
  count_pack("pack f32 to bf16", DType::f32, DType::bf16);
  count_pack("pack f32 to f32", DType::f32, DType::f32);
}

TEST(reduce_shards) {
  count_sum("reduce_shards e4m3, 8 ranks", DType::e4m3, DType::e4m3);
  count_sum("reduce_shards e4m3 to f32, 8 ranks", DType::e4m3, DType::f32);
  count_sum("reduce_shards bf16, 8 ranks", DType::bf16, DType::bf16);
  count_sum("reduce_shards f32, 8 ranks", DType::f32, DType::f32);
}

TEST(grad_norm) {
  count_norm("grad_norm e4m3", DType::e4m3);
  count_norm("grad_norm bf16", DType::bf16);
  count_norm("grad_norm f32", DType::f32);
}

TEST(accumulate) {
  count_accumulate("accumulate_ e4m3 to e4m3", DType::e4m3, DType::e4m3, 2);
  count_accumulate("accumulate_ bf16 to e4m3", DType::e4m3, DType::bf16, 2);
  count_accumulate("accumulate_ bf16 to bf16", DType::bf16, DType::bf16, 1);
}

TEST(subset_sums) {
  count_subsets("subset_sums bf16, rows", {kShape.cols, false});
  count_subsets("subset_sums bf16, columns", {kShape.cols, true});
}
