// A product of FP8 operands, which are decoded as they are packed. The result is cut into cells: a
// thread packs the rows of b for cells in the same columns once, decodes the rows of a for each
// cell, and multiplies them tile by tile. Nothing decoded leaves its caches.
#include "quaver/gemm.h"

#include <algorithm>
#include <memory>

#include "../arguments.h"
#include "parallel.h"
#include "simd_product.h"

namespace quaver::cpu {
namespace {

constexpr int64_t kPacked = 4 << 20;     // bytes of packed b, unless one tile has more
constexpr int64_t kDecoded = 192 << 10;  // and of a, which stay in the second-level cache
constexpr int64_t kMostRows = 96;        // of a cell
constexpr int64_t kCells = 32;           // share out well among threads
constexpr int64_t kProducts = 1 << 21;   // for which a thread pays

int64_t cut(int64_t n, int64_t part) { return (n + part - 1) / part; }

// The result in cells of whole tiles, `down` times `across` of them, whose sizes differ by a tile
// at most; and the memory of one.
struct Cells {
  int64_t tiles_down, tiles_across, down, across;
  int64_t words, pitch;  // of a row of a, and with what keeps rows off each other in the cache
  int64_t panel;         // words of a tile's columns of b

  Cells(int64_t m, int64_t n, int64_t k, const ProductSimd& simd) {
    words = cut(k, simd.depth);
    const int64_t whole = cut(words, simd.step) * simd.step;
    pitch = whole + 16;
    panel = whole * simd.cols;
    tiles_down = cut(m, simd.rows);
    tiles_across = cut(n, simd.cols);
    const int64_t bytes = sizeof(uint32_t);
    across = cut(tiles_across, std::max<int64_t>(1, kPacked / (panel * bytes + 1)));
    const int64_t rows = std::clamp(kDecoded / (pitch * bytes), simd.rows, kMostRows);
    down = std::max(cut(tiles_down, rows / simd.rows), cut(kCells, across));
    down = std::min(down, tiles_down);
  }
  int64_t most_tiles_down() const { return cut(tiles_down, down); }
  int64_t most_tiles_across() const { return cut(tiles_across, across); }
};

// An operand and its scales: one for all of K in each row, or one for each kScaleTile of K.
struct Operand {
  const TensorView codes;
  const float* scales;
  const Layout layout;

  CodeRows rows(int64_t first, int64_t most) const {
    return {codes.as<const uint8_t>() + first * codes.cols, codes.dtype, codes.cols,
            std::min(most, codes.rows - first), codes.cols};
  }
  bool has_blocks() const { return layout.grain == Grain::block || layout.grain == Grain::tile; }
  float scale(int64_t row, int64_t block) const {
    if (layout.grain == Grain::tensor) return *scales;
    const int64_t in_row = layout.scales_in_row(codes.cols);
    if (in_row == 0) return 1.0f;  // no values
    return scales[row / layout.height() * in_row + (has_blocks() ? block : 0)];
  }
  // out[block][row], zero for rows that do not exist.
  void copy_scales(float* out, int64_t blocks, int64_t first, int64_t rows) const {
    for (int64_t i = 0; i < blocks; ++i)
      for (int64_t r = 0; r < rows; ++r, ++out)
        *out = first + r < codes.rows ? scale(first + r, i) : 0.0f;
  }
};

// A tile of the result: its place, and its operands.
struct Tile {
  int64_t row, col, rows;
  const uint32_t *a, *b, *next;      // `next` is the b of the next tile
  const float *scales_a, *scales_b;  // of the first block
};

class Product {
 public:
  Product(const GemmArguments& g, const Layout& layout_a, const Layout& layout_b)
      : g_(g),
        a_{g.a, g.scale_a, layout_a},
        b_{g.b, g.scale_b, layout_b},
        simd_(*product_simd()),
        cells_(g.a.rows, g.b.rows, g.a.cols, simd_) {
    if (!a_.has_blocks() && !b_.has_blocks()) return;
    blocks_ = std::max<int64_t>(1, cut(g.a.cols, kScaleTile));
    block_words_ = kScaleTile / simd_.depth;
  }
  void run();

 private:
  // What a thread's cells reuse: for each tile, its operand and [blocks][rows or columns] scales.
  struct Memory {
    std::unique_ptr<uint32_t[]> packed, decoded;
    std::unique_ptr<float[]> scales_b, scales_a;
    int64_t column = -1;  // of cells, whose b is packed
  };
  Memory memory() const;
  void pack(Memory* to, int64_t first_tile, int64_t tiles) const;
  void decode(Memory* to, int64_t first_tile, int64_t tiles) const;
  void run_cell(int64_t cell, Memory* memory) const;
  void run_tile(const Tile& tile) const;

  const GemmArguments& g_;
  const Operand a_, b_;
  const ProductSimd& simd_;
  const Cells cells_;
  int64_t blocks_ = 1;  // of K
  int64_t block_words_ = cells_.words;
};

Product::Memory Product::memory() const {
  const int64_t down = cells_.most_tiles_down(), across = cells_.most_tiles_across();
  Memory m;
  m.packed.reset(new uint32_t[across * cells_.panel]);
  m.decoded.reset(new uint32_t[down * simd_.rows * cells_.pitch]);
  m.scales_b.reset(new float[across * blocks_ * simd_.cols]);
  m.scales_a.reset(new float[down * blocks_ * simd_.rows]);
  return m;
}

void Product::pack(Memory* to, int64_t first_tile, int64_t tiles) const {
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = (first_tile + t) * simd_.cols;
    simd_.pack_columns(to->packed.get() + t * cells_.panel, b_.rows(row, simd_.cols));
    b_.copy_scales(to->scales_b.get() + t * blocks_ * simd_.cols, blocks_, row, simd_.cols);
  }
}

void Product::decode(Memory* to, int64_t first_tile, int64_t tiles) const {
  const int64_t first = first_tile * simd_.rows;
  simd_.decode_rows(to->decoded.get(), cells_.pitch, a_.rows(first, tiles * simd_.rows));
  for (int64_t t = 0; t < tiles; ++t)
    a_.copy_scales(to->scales_a.get() + t * blocks_ * simd_.rows, blocks_, first + t * simd_.rows,
                   simd_.rows);
}

void Product::run_tile(const Tile& t) const {
  alignas(64) float sums[kMostSums], total[kMostSums];
  for (int64_t i = 0; i < blocks_; ++i) {
    const int64_t first = i * block_words_;
    const TileScales scales = {t.scales_a + i * simd_.rows, t.scales_b + i * simd_.cols};
    const int64_t words = std::min(block_words_, cells_.words - first);
    const uint32_t* b = t.b + first * simd_.cols;
    simd_.multiply(sums, t.a + first, cells_.pitch, b, t.rows, words,
                   i + 1 < blocks_ ? b + words * simd_.cols : t.next);
    if (i + 1 < blocks_) {
      simd_.add(total, sums, scales, t.rows, i == 0);
      continue;
    }
    ProductTile to;
    to.type = g_.out.dtype;
    to.stride = g_.out.cols;
    to.out = static_cast<char*>(g_.out.data) + (t.row * to.stride + t.col) * size_of(to.type);
    to.rows = t.rows;
    to.cols = std::min(simd_.cols, g_.out.cols - t.col);
    to.scales = scales;
    to.total = i > 0 ? total : nullptr;
    to.bias = g_.bias == nullptr ? nullptr : g_.bias + t.col;
    to.accumulate = g_.accumulate;
    simd_.finish(to, sums);
  }
}

void Product::run_cell(int64_t cell, Memory* memory) const {
  const int64_t column = cell / cells_.down, row = cell % cells_.down;
  const int64_t first_across = column * cells_.tiles_across / cells_.across;
  const int64_t across = (column + 1) * cells_.tiles_across / cells_.across - first_across;
  const int64_t first_down = row * cells_.tiles_down / cells_.down;
  const int64_t down = (row + 1) * cells_.tiles_down / cells_.down - first_down;
  if (memory->column != column) pack(memory, first_across, across);
  memory->column = column;
  decode(memory, first_down, down);
  for (int64_t c = 0; c < across; ++c) {
    for (int64_t r = 0; r < down; ++r) {
      Tile t;
      t.row = (first_down + r) * simd_.rows;
      t.col = (first_across + c) * simd_.cols;
      t.rows = std::min(simd_.rows, g_.a.rows - t.row);
      t.a = memory->decoded.get() + r * simd_.rows * cells_.pitch;
      t.b = memory->packed.get() + c * cells_.panel;
      t.next = r + 1 < down ? t.b : t.b + cells_.panel;
      t.scales_a = memory->scales_a.get() + r * blocks_ * simd_.rows;
      t.scales_b = memory->scales_b.get() + c * blocks_ * simd_.cols;
      run_tile(t);
    }
  }
}

void Product::run() {
  auto body = [&](int64_t begin, int64_t end) {
    Memory m = memory();
    for (int64_t cell = begin; cell < end; ++cell) run_cell(cell, &m);
  };
  const int64_t tiles = cells_.most_tiles_down() * cells_.most_tiles_across();
  const int64_t work = tiles * simd_.rows * simd_.cols * std::max<int64_t>(1, g_.a.cols);
  parallel_for(cells_.down * cells_.across, kProducts / work, body);
}

}  // namespace

bool has_gemm() { return product_simd() != nullptr; }

void gemm(const GemmArguments& g, const Layout& layout_a, const Layout& layout_b) {
  check_gemm(g);
  QUAVER_CHECK(has_gemm(), "gemm: ", isa(), " has no products of its own; multiply decoded codes");
  QUAVER_CHECK(g.out.dtype == DType::f32 || g.out.dtype == DType::bf16,
               "gemm: the CPU writes f32 or bf16, got ", name_of(g.out.dtype));
  for (const Layout& layout : {layout_a, layout_b})
    QUAVER_CHECK(layout.grain != Grain::block || layout.block == kScaleTile,
                 "gemm: blocks must be 1 x ", kScaleTile, ", got 1 x ", layout.block);
  if (g.out.numel() > 0) Product(g, layout_a, layout_b).run();
}

}  // namespace quaver::cpu
