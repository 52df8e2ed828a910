// rotate of the CUDA backend, run on the host: the bits of the CPU backend.
#include "quaver/rotate.h"
#include "simt/cases.h"

using namespace quaver;
using namespace quaver::test;

namespace {

struct Case {
  int64_t batch, length, head_dim;
  std::vector<int64_t> heads;  // of each part
  int64_t turned;
};

// Parts whose heads lie in rows of all heads, or each head's rows together.
struct Parts {
  std::vector<Buffer> memory;
  Rotation r;

  Parts(const Case& c, DType type, bool by_head, int64_t skew) {
    r.dtype = type;
    r.batch = c.batch;
    r.length = c.length;
    r.head_dim = c.head_dim;
    r.turned = c.turned;
    for (const int64_t heads : c.heads) {
      const int64_t n = c.batch * c.length * heads * c.head_dim;
      memory.emplace_back(n * size_of(type), skew * size_of(type));
      fill(&memory.back(), type, n, 7 + r.parts);
      HeadsView& part = r.part[r.parts++];
      part.heads = heads;
      part.batch_stride = c.length * heads * c.head_dim;
      part.row_stride = by_head ? c.head_dim : heads * c.head_dim;
      part.head_stride = by_head ? c.length * c.head_dim : c.head_dim;
    }
    for (size_t k = 0; k < memory.size(); ++k) r.part[k].data = memory[k].data();
  }
};

void check(const Case& c, DType type, bool by_head = false, int64_t skew = 0,
           float special = 1.0f) {
  Parts parts(c, type, by_head, skew);
  const int64_t angles = c.length * c.head_dim, bytes = parts.r.numel() * size_of(type);
  if (type == DType::f32 && special != 1.0f) parts.memory[0].as<float>()[1] = special;
  Buffer cos(4 * angles, 4 * skew), sin(4 * angles, 4 * skew);
  fill(&cos, DType::f32, angles, 1);
  fill(&sin, DType::f32, angles, 2);
  for (const bool inverse : {false, true}) {
    Buffer wanted(bytes, skew * size_of(type)), got(bytes, skew * size_of(type));
    Rotation r = parts.r;
    r.cos = cos.as<float>();
    r.sin = sin.as<float>();
    r.inverse = inverse;
    r.out = wanted.data();
    cpu::rotate(r);
    r.out = got.data();
    cuda::rotate(r, nullptr);
    CHECK(same_values(wanted, got, type));
    CHECK(wanted.guards_hold() && got.guards_hold());
  }
}

}  // namespace

TEST(heads_of_every_size) {
  for (const int64_t dim : {2, 6, 16, 30, 64, 80, 128, 200, 1200})
    for (const DType type : {DType::f32, DType::bf16}) {
      in_every_order([&] { check({1, 9, dim, {5}, 3}, type); });
      check({2, 5, dim, {2, 1, 3}, 3}, type, true);
    }
}

TEST(all_heads_and_none) {
  for (const int64_t turned : {0, 1, 4, 7})
    check({1, 10, 32, {4, 2, 1}, turned}, DType::bf16, turned % 2 == 0);
  check({0, 3, 16, {2}, 1}, DType::bf16);
  check({2, 3, 16, {0}, 0}, DType::f32);
}

TEST(views_that_are_not_aligned) {
  for (const int64_t skew : {1, 8}) check({1, 4, 64, {3}, 2}, DType::bf16, false, skew);
}

TEST(awkward_values) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float special : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()})
    check({1, 1, 16, {2}, 1}, DType::f32, false, 0, special);
}

TEST(wrong_arguments_are_named) {
  Parts parts({1, 2, 7, {3}, 1}, DType::f32, false, 0);
  CHECK_THROWS(cpu::rotate(parts.r), "rotate: a head must have an even number of values, got 7");
  parts.r.head_dim = 6;
  parts.r.turned = 4;
  CHECK_THROWS(cuda::rotate(parts.r, nullptr), "rotate: turned must be in [0, 3], got 4");
  parts.r.dtype = DType::f16;
  CHECK_THROWS(cuda::rotate(parts.r, nullptr), "rotate: parts must be f32 or bf16, got f16");
}
