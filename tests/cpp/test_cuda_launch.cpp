// How the CUDA backend cuts work: every element exactly once, within bounds, and with 64 bits where
// there are more than 2^31 of them. Grids that large run one block, on memory that is reserved and
// not used.
#include <sys/mman.h>

#include "cuda/dispatch.h"
#include "cuda/tensor_list.h"
#include "cuda/transpose_tile.h"
#include "quaver/optimizer.h"
#include "quaver/quantize.h"
#include "simt/cases.h"

using namespace quaver;
using namespace quaver::test;

namespace {

constexpr int64_t kSizes[] = {1, 3, 15, 16, 17, 63, 127, 128, 129, 255, 257, 400};

// Addresses without memory behind them but where they are touched.
class Reserved {
 public:
  Reserved(DType type, int64_t rows, int64_t cols) : bytes_(rows * cols * size_of(type)) {
    constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, -1, 0);
    CHECK(memory != MAP_FAILED);
    view_ = {memory, type, rows, cols};
  }
  Reserved(const Reserved&) = delete;
  ~Reserved() { munmap(view_.data, bytes_); }
  const TensorView& view() const { return view_; }
  unsigned char* at(int64_t row, int64_t col) const {
    return view_.as<unsigned char>() + (row * view_.cols + col) * size_of(view_.dtype);
  }

 private:
  int64_t bytes_;
  TensorView view_;
};

// Of a grid of many blocks only the last runs, and loops have a block for every turn.
struct LastBlock {
  LastBlock() {
    simt::control.chosen = [](int64_t blocks) { return std::vector<int64_t>{blocks - 1}; };
    simt::control.multiprocessors = int64_t(1) << 40;
  }
  ~LastBlock() { simt::control = {}; }
};

// A matrix of 2^31 + 163840 elements, and its last tile: 5 x 128.
constexpr int64_t kRows = (1 << 16) + 5, kCols = 1 << 15;
constexpr int64_t kTailRows = 5, kTailCols = 128, kTail = kTailRows * kTailCols;
constexpr int64_t kRow = kRows - kTailRows, kCol = kCols - kTailCols;

// Writes the last tile of `to` with what is in `from`, and reads it into `from`.
void put_tile(const Reserved& to, Buffer& from) {
  const int64_t size = size_of(to.view().dtype);
  for (int64_t r = 0; r < kTailRows; ++r)
    std::memcpy(to.at(kRow + r, kCol), from.data() + r * kTailCols * size, kTailCols * size);
}

bool tile_is(const Reserved& got, Buffer& wanted) {
  const int64_t size = size_of(got.view().dtype);
  for (int64_t r = 0; r < kTailRows; ++r)
    if (std::memcmp(got.at(kRow + r, kCol), wanted.data() + r * kTailCols * size, kTailCols * size))
      return false;
  return true;
}

bool transposed_tile_is(const Reserved& got, Buffer& wanted) {
  for (int64_t c = 0; c < kTailCols; ++c)
    if (std::memcmp(got.at(kCol + c, kRow), wanted.data() + c * kTailRows, kTailRows)) return false;
  return true;
}

TensorView tail_view(Buffer& b, DType type) { return view(b, type, kTailRows, kTailCols); }

ScaleSource given() { return {true, nullptr}; }

}  // namespace

TEST(tiles_cover_every_element_once) {
  for (const int64_t rows : kSizes)
    for (const int64_t cols : kSizes) {
      const cuda::Tiles t = cuda::make_tiles(rows, cols);
      std::vector<int> by_rows(rows * cols), by_columns(rows * cols);
      for (int64_t b = 0; b < cuda::tile_count(t); ++b) {
        const int64_t row0 = b / t.across * cuda::kTile, col0 = b % t.across * cuda::kTile;
        CHECK(row0 < rows && col0 < cols);
        for (int thread = 0; thread < cuda::kThreads; ++thread) {
          for (int pass = 0; pass < cuda::kPasses; ++pass) {
            const cuda::TilePlace at = cuda::place_in_pass(pass, thread);
            CHECK(at.row < cuda::kTile && at.chunk < cuda::kChunks);
            for (int i = 0; i < cuda::kVector; ++i) {
              const int64_t row = row0 + at.row, col = col0 + at.chunk * cuda::kVector + i;
              if (row < rows && col < cols) ++by_rows[row * cols + col];
            }
          }
          // As store_transposed: 16 rows of 4 columns.
          const int64_t row = row0 + thread % cuda::kChunks * cuda::kVector;
          const int64_t col = col0 + thread / cuda::kChunks * 4;
          for (int64_t r = row; r < std::min(row + cuda::kVector, rows); ++r)
            for (int64_t c = col; c < std::min(col + 4, cols); ++c) ++by_columns[r * cols + c];
        }
      }
      for (const int count : by_rows) CHECK_EQ(count, 1);
      for (const int count : by_columns) CHECK_EQ(count, 1);
    }
}

// Each group's span is the values that share a scale on the CPU, and all its threads agree on it.
TEST(groups_cover_every_element_once) {
  for (const int64_t rows : {int64_t(1), int64_t(3), int64_t(17), int64_t(300)})
    for (const int64_t cols : {1, 7, 16, 31, 513, 600, 4100})
      for (const int64_t block : {0, 1, 16, 33, 128, 512, 1000}) {
        Layout o;
        o.grain = block == 0 ? Grain::row : Grain::block;
        o.block = block;
        const TensorView x{nullptr, DType::f32, rows, cols};
        const cuda::ScaleSets g = cuda::make_scale_sets(x, o);
        CHECK_EQ(g.count, o.scale_count(x));
        CHECK_EQ(cuda::kThreads % g.threads, 0);
        std::vector<int> seen(rows * cols);
        for (int64_t b = 0; b < cuda::scale_set_blocks(g); ++b)
          for (int thread = 0; thread < cuda::kThreads; ++thread) {
            const cuda::Span s = cuda::span_of(g, b, thread);
            if (s.group >= g.count) CHECK_EQ(s.n, 0);
            if (thread % g.threads != 0) {
              const cuda::Span first = cuda::span_of(g, b, thread / g.threads * g.threads);
              CHECK(s.group == first.group && s.first == first.first && s.n == first.n);
              continue;
            }
            for (int64_t i = s.first; i < s.first + s.n; ++i) {
              CHECK(i < rows * cols);
              const int64_t width = block == 0 ? cols : block;
              CHECK_EQ(s.group, i / cols * g.per_row + i % cols / width);
              ++seen[i];
            }
          }
        for (const int count : seen) CHECK_EQ(count, 1);
      }
}

TEST(spans_beyond_2_to_the_31) {
  Layout o;
  o.grain = Grain::block;
  o.block = 128;
  const TensorView x{nullptr, DType::bf16, kRows, kCols};
  const cuda::ScaleSets g = cuda::make_scale_sets(x, o);
  const int64_t last = g.count - 1;
  const int per_block = cuda::kThreads / g.threads;
  const cuda::Span s =
      cuda::span_of(g, last / per_block, static_cast<int>(last % per_block) * g.threads);
  CHECK_EQ(s.group, last);
  CHECK_EQ(s.first, kRows * kCols - 128);
  CHECK_EQ(s.n, 128);
}

TEST(a_chunk_belongs_to_the_entry_that_has_it) {
  struct Entry {
    int64_t first;
  };
  for (uint64_t seed = 0; seed < 50; ++seed) {
    std::vector<Entry> table;
    std::vector<int64_t> owners;
    for (int64_t i = 0; i < 1 + int64_t(seed % 9); ++i) {
      table.push_back({static_cast<int64_t>(owners.size())});
      const int64_t chunks = random_bits(seed, i) % 4;  // 0: an empty tensor
      owners.insert(owners.end(), chunks, i);
    }
    for (size_t chunk = 0; chunk < owners.size(); ++chunk)
      CHECK_EQ(cuda::owner_of(table.data(), int64_t(table.size()), int64_t(chunk)), owners[chunk]);
  }
}

TEST(loops_have_a_block_for_every_multiprocessor_and_no_more_than_they_need) {
  for (const int64_t processors : {1, 132}) {
    simt::control.multiprocessors = processors;
    for (const int64_t n : {int64_t(0), int64_t(1), cuda::kBlockSpan, cuda::kBlockSpan + 1,
                            int64_t(1) << 33, int64_t(1) << 52}) {
      const int64_t blocks = cuda::loop_blocks("test", n);
      CHECK(blocks >= 1 && blocks <= 8 * processors);
      if (blocks > 1) CHECK((blocks - 1) * cuda::kBlockSpan < n);
      if (blocks < 8 * processors) CHECK(blocks * cuda::kBlockSpan >= n);
    }
  }
  simt::control = {};
}

namespace {

// Parameters with states of O2 or of f32 at addresses that nothing looks at.
AdamParameter far_parameter(int64_t rows, int64_t cols, bool low) {
  static float f = 1.0f;
  static int64_t step = 0;
  static const double hyper[5] = {};
  AdamParameter p;
  float* scale = low ? &f : nullptr;
  p.weight = {{nullptr, low ? DType::f16 : DType::f32, rows, cols}, scale, scale};
  p.exp_avg = {{nullptr, low ? DType::e4m3 : DType::f32, rows, cols}, scale, scale};
  p.exp_avg_sq = {{nullptr, low ? DType::f16 : DType::f32, rows, cols}, scale, scale};
  p.grad = {nullptr, DType::bf16, rows, cols};
  p.grad_amax = &f;
  if (low) {
    p.fp8 = {&f, DType::e4m3, rows, cols};
    p.fp8_t = {&f, DType::e4m3, cols, rows};
    p.fp8_scale = &f;
  }
  p.step = &step;
  p.hyper = hyper;
  return p;
}

// The largest grid of one call of adam.
int64_t adam_blocks(const std::vector<AdamParameter>& parameters) {
  int64_t most = 0;
  simt::control.chosen = [](int64_t) { return std::vector<int64_t>{}; };
  simt::control.seen = [&](const char*, int64_t blocks) { most = std::max(most, blocks); };
  int64_t skipped = 0;
  try {
    cuda::adam(parameters.data(), int64_t(parameters.size()), &skipped, nullptr, nullptr);
  } catch (...) {
    simt::control = {};
    throw;
  }
  simt::control = {};
  return most;
}

}  // namespace

TEST(adam_has_a_block_for_every_chunk) {
  CHECK_EQ(adam_blocks({far_parameter(1, 16384, false)}), 1);
  CHECK_EQ(adam_blocks({far_parameter(1, 16385, false)}), 2);
  CHECK_EQ(adam_blocks({far_parameter(129, 257, true)}), 2 * 3);
  CHECK_EQ(adam_blocks({far_parameter(0, 5, false), far_parameter(1, 1, true),
                        far_parameter(0, 7, true), far_parameter(1000, 33, false)}),
           0 + 1 + 0 + 3);
  CHECK_EQ(adam_blocks({far_parameter(kRows, kCols, true), far_parameter(kRows, kCols, false)}),
           513 * 256 + (kRows * kCols + 16383) / 16384);
  CHECK_THROWS(adam_blocks({far_parameter(int64_t(1) << 45, 1, false)}),
               "adam_: a launch takes 1 to 2^31 - 1 blocks, got 2147483648");
}

// A chunk that was updated twice, or not at all, differs from the CPU's.
TEST(adam_updates_every_element_of_every_chunk_once) {
  for (const int64_t n : {1, 3, 16383, 16384, 16385, 32767, 40000}) {
    std::vector<float> state[2][3];
    for (auto& copy : state)
      for (int k = 0; k < 3; ++k) copy[k].assign(n, k == 0 ? 1.0f : 0.0f);
    std::vector<float> grad(n);
    for (int64_t i = 0; i < n; ++i) grad[i] = float(random_bits(3, i) % 1000) * 1e-3f;
    float amax = 1.0f;
    int64_t step[2] = {}, skipped = 0;
    const double hyper[5] = {1e-2, 0.9, 0.95, 1e-8, 0.1};
    for (int backend = 0; backend < 2; ++backend) {
      AdamParameter p;
      StateView* states[] = {&p.weight, &p.exp_avg, &p.exp_avg_sq};
      for (int k = 0; k < 3; ++k) states[k]->values = view(state[backend][k]);
      p.grad = view(grad);
      p.grad_amax = &amax;
      p.step = &step[backend];
      p.hyper = hyper;
      Buffer workspace(cuda::adam_workspace_bytes(&p, 1));
      if (backend == 0)
        cpu::adam(&p, 1, &skipped);
      else
        cuda::adam(&p, 1, &skipped, workspace.data(), nullptr);
    }
    for (int k = 0; k < 3; ++k) CHECK(same_bits(state[0][k], state[1][k]));
  }
}

TEST(casts_reach_beyond_2_to_the_31_elements) {
  const Reserved x(DType::bf16, kRows, kCols), q(DType::e4m3, kRows, kCols),
      qt(DType::e4m3, kCols, kRows), back(DType::f32, kRows, kCols);
  Buffer tail(2 * kTail), codes(kTail), codes_t(kTail), decoded(4 * kTail);
  fill(&tail, DType::bf16, kTail, 5);
  put_tile(x, tail);
  std::vector<float> scale(1, 0.25f), amax(1), cuda_amax(1);
  cpu::cast_transpose(tail_view(codes, DType::e4m3),
                      view(codes_t, DType::e4m3, kTailCols, kTailRows), view(scale), view(amax),
                      tail_view(tail, DType::bf16), true, given());
  cpu::dequantize(tail_view(decoded, DType::f32), tail_view(codes, DType::e4m3), view(scale), {});
  const LastBlock only;
  // Zeros stand for what the other blocks would leave.
  std::vector<char> memory(cuda::cast_workspace_bytes(kRows, kCols));
  const ScaleSource source = {true, nullptr, false, memory.data()};
  cuda::cast_transpose(q.view(), qt.view(), view(scale), view(cuda_amax), x.view(), true, source,
                       nullptr);
  CHECK(tile_is(q, codes) && transposed_tile_is(qt, codes_t) && same_bits(amax, cuda_amax));
  for (int64_t r = 0; r < kTailRows; ++r) std::memset(q.at(kRow + r, kCol), 0, kTailCols);

  // The last block of a loop has 4096 elements, of which the last row of the tile is the end.
  Buffer last_codes(kTailCols), last(4 * kTailCols);
  std::memcpy(last_codes.data(), codes.data() + kTail - kTailCols, kTailCols);
  std::memcpy(last.data(), decoded.data() + 4 * (kTail - kTailCols), 4 * kTailCols);
  cuda::quantize(q.view(), view(scale), view(cuda_amax), x.view(), {}, source, nullptr);
  CHECK(!std::memcmp(q.at(kRows - 1, kCol), last_codes.data(), kTailCols));
  cuda::dequantize(back.view(), q.view(), view(scale), {}, nullptr);
  CHECK(!std::memcmp(back.at(kRows - 1, kCol), last.data(), 4 * kTailCols));
}

TEST(adam_reaches_beyond_2_to_the_31_elements) {
  const DType types[] = {DType::f16, DType::e4m3, DType::f16};
  const Reserved weight(types[0], kRows, kCols), exp_avg(types[1], kRows, kCols),
      exp_avg_sq(types[2], kRows, kCols), grad(DType::bf16, kRows, kCols),
      fp8(DType::e4m3, kRows, kCols), fp8_t(DType::e4m3, kCols, kRows);
  const Reserved* states[] = {&weight, &exp_avg, &exp_avg_sq};
  Buffer tail[] = {Buffer(2 * kTail), Buffer(kTail), Buffer(2 * kTail)};
  Buffer grad_tail(2 * kTail), copy(kTail), copy_t(kTail);
  fill(&tail[0], types[0], kTail, 1);
  fill(&tail[1], types[1], kTail, 2);
  for (unsigned char* b = tail[2].data(); b < tail[2].data() + tail[2].size(); ++b) *b = 0;
  fill(&grad_tail, DType::bf16, kTail, 4);
  for (int k = 0; k < 3; ++k) put_tile(*states[k], tail[k]);
  put_tile(grad, grad_tail);
  const double hyper[5] = {1e-2, 0.9, 0.95, 1e-8, 0.1};
  float numbers[2][8] = {}, grad_amax = 4.0f;
  int64_t step[2] = {}, skipped[2] = {};
  AdamParameter p[2];
  for (int backend = 0; backend < 2; ++backend) {
    float* scales = numbers[backend];
    for (int i = 0; i < 8; ++i) scales[i] = 1.0f;
    StateView* views[] = {&p[backend].weight, &p[backend].exp_avg, &p[backend].exp_avg_sq};
    for (int k = 0; k < 3; ++k)
      *views[k] = {backend == 0 ? tail_view(tail[k], types[k]) : states[k]->view(), scales + 2 * k,
                   scales + 2 * k + 1};
    p[backend].grad = backend == 0 ? tail_view(grad_tail, DType::bf16) : grad.view();
    p[backend].fp8 = backend == 0 ? tail_view(copy, DType::e4m3) : fp8.view();
    p[backend].fp8_t =
        backend == 0 ? view(copy_t, DType::e4m3, kTailCols, kTailRows) : fp8_t.view();
    p[backend].fp8_scale = scales + 6;
    p[backend].grad_amax = &grad_amax;
    p[backend].step = &step[backend];
    p[backend].hyper = hyper;
  }
  Buffer workspace(cuda::adam_workspace_bytes(p, 1));
  cpu::adam(&p[0], 1, &skipped[0]);
  const LastBlock only;
  cuda::adam(&p[1], 1, &skipped[1], workspace.data(), nullptr);
  for (int k = 0; k < 3; ++k) CHECK(tile_is(*states[k], tail[k]));
  CHECK(tile_is(fp8, copy) && transposed_tile_is(fp8_t, copy_t));
  for (int i = 0; i < 8; ++i) CHECK_EQ(numbers[0][i], numbers[1][i]);
  CHECK(step[1] == 1 && skipped[1] == 0);
}

TEST(a_grid_that_is_too_large_is_refused_by_name) {
  std::vector<float> scale(1, 1.0f);
  const TensorView x{nullptr, DType::bf16, int64_t(1) << 38, 128},
      q{nullptr, DType::e4m3, x.rows, 128}, qt{nullptr, DType::e4m3, 128, x.rows};
  simt::control.chosen = [](int64_t) { return std::vector<int64_t>{}; };
  CHECK_THROWS(cuda::cast_transpose(q, qt, view(scale), {}, x, true, given(), nullptr),
               "cast_transpose: a launch takes 1 to 2^31 - 1 blocks, got 2147483648");
  simt::control = {};
}
