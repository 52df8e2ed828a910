// share_scales, pack and reduce_shards of the CUDA backend, run on the host: the bits of the CPU.
#include "quaver/all_reduce.h"
#include "simt/cases.h"

using namespace quaver;
using namespace quaver::test;

namespace {

constexpr DType kTypes[] = {DType::e4m3, DType::e5m2, DType::f16, DType::bf16, DType::f32};

std::vector<float> powers(size_t count) {
  std::vector<float> scales(count);
  for (size_t i = 0; i < count; ++i) scales[i] = i % 4 == 3 ? 0.3f : float(1 << i % 5) / 8.0f;
  return scales;
}

void check_pack_of(DType type, const std::vector<int64_t>& sizes, int64_t skew, int64_t tail) {
  const auto count = static_cast<int64_t>(sizes.size());
  std::vector<Buffer> buffers;
  const std::vector<float> own = powers(sizes.size() + 2), scales = powers(sizes.size());
  int64_t length = tail;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const DType from = kTypes[i % 5];
    buffers.emplace_back(sizes[i] * size_of(from), skew * size_of(from));
    fill(&buffers[i], from, sizes[i], 17 + i);
    length += bucket_length(sizes[i]);
  }
  std::vector<ScaledView> views(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i)
    views[i] = {view(buffers[i], kTypes[i % 5], 1, sizes[i]), i % 3 == 0 ? nullptr : &own[i + 2],
                nullptr};
  const int64_t bytes = length * size_of(type);
  Buffer wanted(bytes), got(bytes, skew * size_of(type), 0x5a);
  Buffer workspace(cuda::pack_workspace_bytes(count));
  const float* given = is_fp8(type) ? scales.data() : nullptr;
  cpu::pack(view(wanted, type, 1, length), views.data(), count, given);
  cuda::pack(view(got, type, 1, length), views.data(), count, given, workspace.data(), nullptr);
  CHECK(wanted.bytes() == got.bytes());
  CHECK(got.guards_hold() && workspace.guards_hold());
}

void check_sum(DType type, bool keep, int64_t ranks, int64_t first, int64_t length, int64_t skew,
               const std::vector<int64_t>& sizes) {
  const auto count = static_cast<int64_t>(sizes.size());
  const DType out_type = keep ? DType::f32 : type;
  Buffer shards(ranks * length * size_of(type), skew * size_of(type));
  fill(&shards, type, ranks * length, 5);
  const std::vector<float> scales = powers(sizes.size()), sum_scales = powers(sizes.size());
  ShardedSum sum;
  sum.shards = view(shards, type, ranks, length);
  sum.first = first;
  sum.sizes = sizes.data();
  sum.count = count;
  sum.scales = is_fp8(type) ? scales.data() : nullptr;
  sum.sum_scales = keep ? nullptr : sum_scales.data();
  const int64_t bytes = length * size_of(out_type);
  Buffer wanted(bytes), got(bytes, skew * size_of(out_type), 0x5a);
  std::vector<float> amax(count, -1.0f), cuda_amax(count, -2.0f);
  std::vector<int32_t> saturated(count, -1), cuda_saturated(count, -2);
  Buffer workspace(cuda::reduce_shards_workspace_bytes(count));
  cpu::reduce_shards(view(wanted, out_type, 1, length), amax.data(), saturated.data(), sum);
  cuda::reduce_shards(view(got, out_type, 1, length), cuda_amax.data(), cuda_saturated.data(), sum,
                      workspace.data(), nullptr);
  CHECK(wanted.bytes() == got.bytes());
  CHECK(same_bits(amax, cuda_amax));
  CHECK(saturated == cuda_saturated);
  CHECK(got.guards_hold() && workspace.guards_hold());
}

const std::vector<int64_t> kSizes = {5, 0, 16, 700, 0, 1, 16384, 3, 40001, 0};

}  // namespace

TEST(scales_of_many_tensors) {
  constexpr int64_t ranks = 3, count = 300;
  Buffer amaxes(ranks * count * 4);
  fill(&amaxes, DType::f32, ranks * count, 3);
  for (int64_t i = 0; i < ranks * count; ++i) {
    float& a = amaxes.as<float>()[i];
    a = a < 0.0f ? -a : a;
    if (i % 70 == 9) a = std::numeric_limits<float>::quiet_NaN();
    if (i % 90 == 11) a = 3e38f;
  }
  const std::vector<float> mu(count, 0.35355339f);
  for (const DType type : {DType::e4m3, DType::e5m2}) {
    for (const float* given : {static_cast<const float*>(nullptr), mu.data()}) {
      std::vector<float> a(count, -1), b(count, -2), c(count, -3), d(count, -4);
      cpu::share_scales(a.data(), b.data(), amaxes.as<float>(), given, ranks, count, type);
      cuda::share_scales(c.data(), d.data(), amaxes.as<float>(), given, ranks, count, type,
                         nullptr);
      CHECK(same_bits(a, c) && same_bits(b, d));
      for (int64_t t = 0; t < count; ++t) CHECK(is_power_of_two(a[t]) && is_power_of_two(b[t]));
    }
  }
}

TEST(pack_every_type) {
  for (const DType type : kTypes) {
    check_pack_of(type, kSizes, 0, 0);
    check_pack_of(type, {7}, 0, 48);
  }
  check_pack_of(DType::e4m3, {}, 0, 32);
  check_pack_of(DType::e4m3, {}, 0, 0);
}

TEST(pack_orders_and_odd_views) {
  in_every_order([] { check_pack_of(DType::e4m3, kSizes, 0, 16); });
  check_pack_of(DType::e4m3, kSizes, 3, 16);
  check_pack_of(DType::bf16, kSizes, 3, 16);
}

// A table of more than one page.
TEST(pack_very_many) {
  std::vector<int64_t> sizes(700);
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = static_cast<int64_t>(i % 40);
  check_pack_of(DType::e4m3, sizes, 0, 0);
  check_sum(DType::e4m3, false, 2, 1600, 8000, 0, sizes);
}

TEST(sum_every_type_and_number_of_ranks) {
  for (const DType type : kTypes)
    for (const bool keep : {false, true})
      for (const int64_t ranks : {1, 2, 5, 9}) check_sum(type, keep, ranks, 0, 57152, 0, kSizes);
}

// Shards that begin and end in the middle of tensors, before the first and behind the last.
TEST(sum_every_shard) {
  for (const int64_t first : {0, 16, 32, 736, 752, 17136, 20000, 57120, 60000})
    for (const int64_t length : {0, 16, 720, 20000})
      check_sum(DType::e4m3, false, 3, first, length, 0, kSizes);
}

TEST(sum_orders_and_odd_views) {
  in_every_order([] { check_sum(DType::e4m3, false, 4, 640, 40000, 0, kSizes); });
  check_sum(DType::e4m3, false, 4, 640, 40000, 3, kSizes);
  check_sum(DType::bf16, true, 4, 640, 40000, 3, kSizes);
}

TEST(wrong_arguments_are_named) {
  Buffer a(64), b(64);
  const ScaledView x{view(a, DType::f32, 1, 16)};
  CHECK_THROWS(cuda::pack(view(b, DType::e4m3, 1, 16), &x, 1, nullptr, nullptr, nullptr),
               "a bucket of e4m3 needs scales");
  ShardedSum sum;
  sum.shards = view(a, DType::e4m3, 2, 24);
  CHECK_THROWS(
      cuda::reduce_shards(view(b, DType::e4m3, 1, 24), nullptr, nullptr, sum, nullptr, nullptr),
      "a shard's length must be a multiple of 16, got 24");
}
