// Counts of casts with one scale, and with scales of rows, blocks and tiles.
#include "count.h"
#include "quaver/quantize.h"
#include "simt/layouts.h"

using namespace quaver;
using namespace quaver::test;

namespace {

// bf16 to e4m3 and back to bf16, with scales of so many values.
void count_quantize(const char* cast, const char* back, const Layout& layout, double values_each) {
  Buffer x(2 * kElements), q(kElements), decoded(2 * kElements);
  fill_small(&x, DType::bf16, kElements, 1);
  QuantizeOptions o;
  o.layout = layout;
  const auto scales = static_cast<size_t>(layout.scale_count(values(x, DType::bf16)));
  std::vector<float> scale(scales), amax(scales);
  count(cast, 3 + 8 / values_each, [&] {
    cuda::quantize(values(q, DType::e4m3), view(scale), view(amax), values(x, DType::bf16), o, {},
                   nullptr);
  });
  count(back, 3 + 4 / values_each, [&] {
    cuda::dequantize(values(decoded, DType::bf16), values(q, DType::e4m3), view(scale), layout,
                     nullptr);
  });
}

// bf16 to both layouts. `read` are the bytes an element of the reads that it takes.
void count_layouts(const char* name, Grain grain, bool tiles_t, double read) {
  Buffer x(2 * kElements);
  fill_small(&x, DType::bf16, kElements, 1);
  LayoutsCast cast;
  cast.grain = grain;
  cast.tiles_t = tiles_t;
  OperandMemory q(kShape.rows, kShape.cols, cast.layout(), DType::e4m3, 0);
  OperandMemory qt(kShape.cols, kShape.rows, cast.layout_t(), DType::e4m3, 0);
  cast.q = q.operand(q.got, q.got_scale);
  cast.qt = qt.operand(qt.got, qt.got_scale);
  const double scales = 4.0 * static_cast<double>(q.count() + qt.count()) / kElements;
  count(name, read + 2 + scales,
        [&] { cuda::cast_layouts(cast, values(x, DType::bf16), nullptr); });
}

// A cast as linear layers run it, to both layouts or without the transpose, by each source of the
// scale. A scale just in time takes a second read.
void count_modes(const std::string& name, DType type, bool both) {
  Buffer x(size_of(type) * kElements);
  fill_small(&x, type, kElements, 1);
  CastMemory to(kShape, DType::e4m3, 0, 0);
  const auto count_by = [&](const char* mode, double reads, bool given) {
    MatrixJob job = {to.cast(given), values(x, type)};
    job.to.amax = nullptr;
    if (!both) job.to.qt = {};
    count((name + mode).c_str(), reads * double(size_of(type)) + (both ? 2 : 1),
          to.history.empty() ? 0 : kHistory, [&] { cuda::cast_matrices(&job, 1, nullptr); });
  };
  count_by(", just in time", 2, false);
  count_by(", given scale", 1, true);
  to.history.assign(kHistoryState, 0.0f);
  count_by(", delayed", 1, false);
}

}  // namespace

TEST(cast_transpose) {
  count_modes("cast_transpose bf16 to e4m3", DType::bf16, true);
  count_modes("cast_transpose f32 to e4m3", DType::f32, true);
  count_modes("cast_transpose bf16 to e4m3 alone", DType::bf16, false);
  count_modes("cast_transpose f32 to e4m3 alone", DType::f32, false);
}

TEST(quantize) {
  Buffer x(2 * kElements), q(kElements), back(4 * kElements);
  fill_small(&x, DType::bf16, kElements, 1);
  CastWorkspace memory(kShape.rows, kShape.cols);
  std::vector<float> scale(1, 0.01f), amax(1);
  count("quantize bf16 to e4m3, just in time", 5, [&] {
    cuda::quantize(values(q, DType::e4m3), view(scale), view(amax), values(x, DType::bf16), {},
                   memory.with({false, nullptr}), nullptr);
  });
  count("quantize bf16 to e4m3, given scale", 3, [&] {
    cuda::quantize(values(q, DType::e4m3), view(scale), view(amax), values(x, DType::bf16), {},
                   memory.with({true, nullptr}), nullptr);
  });
  count("dequantize e4m3 to f32", 5, [&] {
    cuda::dequantize(values(back, DType::f32), values(q, DType::e4m3), view(scale), {}, nullptr);
  });
  count("dequantize e4m3 to bf16", 3, [&] {
    cuda::dequantize(values(back, DType::bf16), values(q, DType::e4m3), view(scale), {}, nullptr);
  });
}

TEST(quantize_groups) {
  count_quantize("quantize bf16 to e4m3, rows", "dequantize e4m3 to bf16, rows", {Grain::row},
                 kShape.cols);
  count_quantize("quantize bf16 to e4m3, blocks", "dequantize e4m3 to bf16, blocks",
                 {Grain::block, kScaleTile}, kScaleTile);
  count_quantize("quantize bf16 to e4m3, tiles", "dequantize e4m3 to bf16, tiles",
                 {Grain::tile, kScaleTile}, kScaleTile * kScaleTile);
}

// Scales of rows in both layouts must be known before the first code, hence two reads.
TEST(cast_layouts) {
  count_layouts("cast_layouts bf16, rows", Grain::row, false, 4);
  count_layouts("cast_layouts bf16, blocks", Grain::block, false, 2);
  count_layouts("cast_layouts bf16, blocks and tiles", Grain::block, true, 2);
  count_layouts("cast_layouts bf16, tiles", Grain::tile, false, 2);
}
