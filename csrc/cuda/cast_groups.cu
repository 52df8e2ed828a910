// The kernels of cast_groups and cast_stack (quaver/groups.h): the casts of cast_layouts.cu, or
// with one scale, for all groups in a few launches. A block of threads finds its group from the
// ends on the device, and its tile there; the tile's slot is also where the group's blocks of
// scales lie.
//
// Scales of groups take two launches: the first leaves the largest magnitudes of each slot in
// `parts` places, of which the second takes its group's.
#include "cast_tile.h"
#include "groups.h"
#include "quaver/gemm.h"
#include "tensor_scale.h"

namespace quaver::cuda {
namespace {

// The targets of a group, whose columns of qt lie between those of others.
struct Own : Targets {
  Columns columns;
};

QUAVER_DEVICE Columns columns_of(const Own& to) { return to.columns; }

struct Job {
  const void* x;
  int64_t rows, cols;  // of x, or of each matrix of a stack
  Groups of;           // without `down`
  int down;            // tiles from the top of a stack's matrix to its bottom
  Targets to;
  int64_t width;             // of qt
  int64_t scales, scales_t;  // of each matrix of a stack
  float* scale;              // of groups
  uint32_t* partial;         // [slots, parts]
  int slots, parts;
  Grain grain;
  bool given, aligned;
};

// The group of a block of threads, as a matrix of its own, and the tile there.
struct Part {
  Own to;
  int64_t first, rows;    // of x: its first element, and its rows that have values
  int group, down;        // of the tile
  int partial, partials;  // of the group, in slots
  bool none;              // rows of no group
};

QUAVER_DEVICE void move_target(Target& t, int64_t codes, int64_t scales) {
  if (t.codes != nullptr) t.codes += codes;
  if (t.scale != nullptr) t.scale += scales;
}

QUAVER_DEVICE Part matrix_part(const Job& job, int slot) {
  Part p = {};
  p.to = {job.to, {job.to.padded.rows, job.width}};
  p.group = slot / job.down;
  p.down = slot - p.group * job.down;
  p.first = p.group * job.rows * job.cols;
  p.rows = job.rows;
  const int64_t codes = p.group * job.to.padded.rows * job.to.padded.cols;
  move_target(p.to.q, codes, p.group * job.scales);
  move_target(p.to.qt, codes, p.group * job.scales_t);
  p.partial = p.group * job.down;
  p.partials = job.down;
  return p;
}

QUAVER_DEVICE Part rows_part(const Job& job, int slot) {
  Part p = {};
  p.group = group_of<kTile>(job.of, slot);
  p.none = p.group == job.of.count;
  const int begin = first_row(job.of, p.group),
            end = p.none ? job.of.most : end_of(job.of, p.group);
  p.partial = first_slot<kTile>(job.of, p.group);
  p.partials = end / kTile + p.group + 1 - p.partial;
  p.down = slot - p.partial;
  p.first = begin * job.cols;
  p.rows = p.none ? 0 : end - begin;
  const int64_t column = group_column(begin, p.group);
  const int64_t last = p.none ? job.width : group_column(end, p.group + 1);
  p.to = {job.to, {last - column, job.width}};
  p.to.padded.rows = end - begin;
  move_target(p.to.q, begin * job.to.padded.cols, begin * job.to.q.per_row);
  const bool by_row = job.grain == Grain::row;
  move_target(p.to.qt, column, by_row ? p.group * job.to.padded.cols : p.partial);
  // Rows of no group have no amaxes in qt, and the last slot is behind its last block of scales.
  if (by_row ? p.none : slot >= job.to.qt.per_row) p.to.qt.scale = nullptr;
  return p;
}

QUAVER_DEVICE Part part_of(const Job& job, int slot) {
  return job.down > 0 ? matrix_part(job, slot) : rows_part(job, slot);
}

// The tile of this block of threads.
struct Place {
  int slot, along;
};

QUAVER_DEVICE Place place_of(const Job& job) {
  const int across = static_cast<int>(job.to.padded.across), block = static_cast<int>(blockIdx.x);
  return {block / across, block % across};
}

template <class X>
QUAVER_DEVICE void load(Packed<sizeof(X)> (&loaded)[kPasses], const Job& job, const Part& p,
                        int64_t row0, int64_t col0) {
  const X* x = static_cast<const X*>(job.x) + p.first;
  load_tile(loaded, x, p.rows, job.cols, row0, col0, job.aligned);
}

// The scales of a tile without values.
QUAVER_DEVICE void clear_scales(const Job& job, const Part& p, int64_t row, int64_t col,
                                int along) {
  const Own& to = p.to;
  const bool first = threadIdx.x == 0, whole = job.grain == Grain::tensor;
  if (whole && first && along == 0 && p.down == 0 && !p.none && !job.given) job.scale[p.group] = 1;
  if (job.grain != Grain::block) return;  // those of rows are written last
  if (to.q.scale != nullptr && row < to.padded.rows) to.q.scale[row * to.q.per_row + along] = 1;
  if (to.qt.scale == nullptr) return;
  if (to.tiles_t ? first : col < to.padded.cols)
    to.qt.scale[(to.tiles_t ? along : col) * to.qt.per_row + p.down] = 1;
}

// A tile without values, in one of a group's slots or of no group: zeros.
QUAVER_DEVICE void clear_tile(const Job& job, const Part& p, int along) {
  const int64_t row0 = int64_t(p.down) * kTile, col0 = int64_t(along) * kTile;
  const Own& to = p.to;
  for (int i = threadIdx.x; i < kTile * kChunks; i += kThreads) {
    const int64_t line = i / kChunks, at = i % kChunks * kVector;
    if (to.q.codes != nullptr && row0 + line < to.padded.rows && col0 + at < to.padded.cols)
      store(to.q.codes + (row0 + line) * to.padded.cols + col0 + at, Packed<1>{}, 1, kVector,
            to.q.aligned);
    if (to.qt.codes != nullptr && col0 + line < to.padded.cols && row0 + at < to.columns.count)
      store(to.qt.codes + (col0 + line) * to.columns.width + row0 + at, Packed<1>{}, 1, kVector,
            to.qt.aligned);
  }
  if (threadIdx.x < kTile) clear_scales(job, p, row0 + threadIdx.x, col0 + threadIdx.x, along);
}

// The largest magnitudes of each slot's rows, which `parts` blocks of threads share.
template <class X>
__global__ void __launch_bounds__(kThreads) measure_groups_kernel(const __grid_constant__ Job job) {
  const int slot = static_cast<int>(blockIdx.x) / job.parts;
  const int part = static_cast<int>(blockIdx.x) % job.parts;
  const Part p = part_of(job, slot);
  const int64_t first = int64_t(p.down) * kTile, left = p.rows - first;
  const int64_t n = (left < kTile ? left : kTile) * job.cols;
  const X* x = static_cast<const X*>(job.x) + p.first + first * job.cols;
  const uint32_t seen = block_max(look(x, n, part, job.parts, job.aligned));
  if (threadIdx.x == 0) job.partial[blockIdx.x] = seen;
}

// The largest magnitude that those blocks saw of a group, in thread 0.
QUAVER_DEVICE uint32_t largest_partial(const Job& job, const Part& p) {
  uint32_t seen = 0;
  const uint32_t* partial = job.partial + int64_t(p.partial) * job.parts;
  for (int64_t i = threadIdx.x; i < int64_t(p.partials) * job.parts; i += kThreads)
    seen = max_bits(seen, partial[i]);
  return block_max(seen);
}

// The scale of a tile that has one, in thread 0. Its first block of threads writes a group's.
template <class X>
QUAVER_DEVICE float choose_one(const Job& job, const Part& p, const Decoded<X>& values, int along) {
  if (job.given) return job.scale[p.group];
  const bool tile = job.grain == Grain::tile;
  const uint32_t seen = tile ? block_max(largest_of(values)) : largest_partial(job, p);
  const float scale = choose(p.to, seen), sound = written(scale, seen);
  if (threadIdx.x != 0) return scale;
  if (tile && p.to.q.scale != nullptr) p.to.q.scale[p.down * p.to.q.per_row + along] = sound;
  if (tile && p.to.qt.scale != nullptr) p.to.qt.scale[along * p.to.qt.per_row + p.down] = sound;
  if (!tile && !p.none && p.down == 0 && along == 0) job.scale[p.group] = sound;
  return scale;
}

// Casts with a scale for each group or tile.
template <class X>
__global__ void __launch_bounds__(kThreads, 1) cast_groups_kernel(const __grid_constant__ Job job) {
  __shared__ OneMemory memory;
  __shared__ float shared;
  const Place at = place_of(job);
  const Part p = part_of(job, at.slot);
  const int64_t row0 = int64_t(p.down) * kTile, col0 = int64_t(at.along) * kTile;
  if (p.rows <= row0) return clear_tile(job, p, at.along);
  Packed<sizeof(X)> loaded[kPasses];
  load<X>(loaded, job, p, row0, col0);
  const Decoded<X> values{loaded};
  const float scale = choose_one(job, p, values, at.along);
  if (threadIdx.x == 0) shared = scale;
  __syncthreads();
  cast_by_one<X, void>(p.to, values, row0, col0, shared, memory);
}

// The amaxes of rows, gathered where their scales will be.
template <class X>
__global__ void __launch_bounds__(kThreads, 1)
    measure_rows_kernel(const __grid_constant__ Job job) {
  __shared__ Amaxes amax;
  __shared__ WarpMaxima maxima;
  const Place at = place_of(job);
  const Part p = part_of(job, at.slot);
  const int64_t row0 = int64_t(p.down) * kTile, col0 = int64_t(at.along) * kTile;
  if (p.rows <= row0) return;
  Packed<sizeof(X)> loaded[kPasses];
  load<X>(loaded, job, p, row0, col0);
  gather_amaxes<X>(p.to, {loaded}, row0, col0, amax, maxima);
}

// Casts with scales of rows, of which there are the amaxes, or of blocks.
template <class X>
__global__ void __launch_bounds__(kThreads, 1) cast_rows_kernel(const __grid_constant__ Job job) {
  __shared__ BlocksMemory memory;
  const Place at = place_of(job);
  const Part p = part_of(job, at.slot);
  const int64_t row0 = int64_t(p.down) * kTile, col0 = int64_t(at.along) * kTile;
  if (p.rows <= row0) return clear_tile(job, p, at.along);
  Packed<sizeof(X)> loaded[kPasses];
  load<X>(loaded, job, p, row0, col0);
  const Decoded<X> values{loaded};
  if (job.grain == Grain::row)
    read_scales(p.to, row0, col0, memory);
  else
    choose_scales<kRunOf<X>>(p.to, values, p.down, at.along, memory);
  encode_both<kRunOf<X>, void>(p.to, values, row0, col0, job.to.tiles_t, memory);
}

// Amaxes to scales, in place, of both layouts.
__global__ void __launch_bounds__(kThreads)
    write_scales_kernel(int64_t count, int64_t count_t, const __grid_constant__ Job job) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count)
    write_scale(job.to, job.to.q.scale + i);
  else if (i < count + count_t)
    write_scale(job.to, job.to.qt.scale + (i - count));
}

const char* op_of(const GroupedCast& c) { return c.stack ? "cast_stack" : "cast_groups"; }

// Of each matrix of a stack, or of all groups.
int64_t rows_of(const GroupedCast& c) {
  return c.stack ? c.x.rows / std::max<int64_t>(1, c.groups) : c.x.rows;
}

int64_t width_of(const GroupedCast& c) {
  return c.stack ? gemm_padded(rows_of(c)) : group_columns(c.x.rows, c.groups);
}

int64_t tiles_down(const GroupedCast& c) {
  return std::max<int64_t>(1, ceil_div(rows_of(c), kTile));
}

int64_t slots_of(const GroupedCast& c) {
  return c.stack ? c.groups * tiles_down(c)
                 : slot_count<kTile>(static_cast<int>(c.x.rows), static_cast<int>(c.groups));
}

// Blocks that look at the rows of a slot: enough to fill the device, each with values to look at.
int64_t parts_of(const GroupedCast& c) {
  const int64_t fill = ceil_div(most_loop_blocks(op_of(c)), std::max<int64_t>(1, slots_of(c)));
  return std::max<int64_t>(1, std::min(fill, ceil_div(kTile * c.x.cols, kBlockSpan)));
}

bool measures_groups(const GroupedCast& c) { return c.grain == Grain::tensor && !c.given; }

// Those of groups lie apart.
Target target(const GroupedCast& c, const TensorView& codes, float* scale, int64_t per_row) {
  if (codes.data == nullptr) return {};
  const bool own = c.grain != Grain::tensor;
  return {codes.as<uint8_t>(), own ? scale : nullptr, per_row, is_aligned(codes.data)};
}

Targets make_targets(const GroupedCast& c) {
  const int64_t rows = c.stack ? gemm_padded(rows_of(c)) : c.x.rows, cols = gemm_padded(c.x.cols);
  const bool fine = c.grain == Grain::block || c.grain == Grain::tile;
  const int64_t one = c.grain == Grain::row ? 1 : 0;
  const int64_t blocks = c.stack ? blocks_in_row(rows, kTile) : group_blocks(rows, c.groups);
  return {make_tiles(rows, cols),
          target(c, c.q, c.scale, fine ? blocks_in_row(cols, kTile) : one),
          target(c, c.qt, c.scale_t, fine ? blocks : one),
          c.q.dtype,
          scale_max(c.q.dtype),
          c.power_of_two,
          c.tiles_t};
}

Job make_job(const GroupedCast& c) {
  const Layout layout = {c.grain, kScaleTile};
  Job job = {};
  job.x = c.x.data;
  job.rows = rows_of(c);
  job.cols = c.x.cols;
  job.of = {c.ends, static_cast<int>(c.x.rows), static_cast<int>(c.groups)};
  job.down = c.stack ? static_cast<int>(tiles_down(c)) : 0;
  job.to = make_targets(c);
  job.width = width_of(c);
  const int64_t rows = job.to.padded.rows, cols = job.to.padded.cols;
  job.scales = layout.scale_count({nullptr, DType::f32, rows, cols});
  job.scales_t = layout.scale_count({nullptr, DType::f32, cols, rows});
  job.scale = c.scale;
  job.partial = static_cast<uint32_t*>(c.workspace);
  job.slots = static_cast<int>(slots_of(c));
  job.parts = static_cast<int>(parts_of(c));
  job.grain = c.grain;
  job.given = c.given;
  job.aligned = c.x.cols % kVector == 0 && is_aligned(c.x.data);
  return job;
}

template <class X>
void run_rows(const char* op, const GroupedCast& c, const Job& job, int64_t tiles, void* stream) {
  const int64_t rows = c.stack ? c.groups * job.to.padded.rows : c.x.rows;
  const int64_t count = c.q.data == nullptr ? 0 : rows;
  const int64_t count_t = c.qt.data == nullptr ? 0 : c.groups * job.to.padded.cols;
  clear(op, c.scale, count * int64_t(sizeof(float)), stream);
  clear(op, c.scale_t, count_t * int64_t(sizeof(float)), stream);
  launch(op, measure_rows_kernel<X>, tiles, kThreads, stream, job);
  launch(op, cast_rows_kernel<X>, tiles, kThreads, stream, job);
  if (count + count_t > 0)
    launch(op, write_scales_kernel, ceil_div(count + count_t, kThreads), kThreads, stream, count,
           count_t, job);
}

template <class X>
void run(const GroupedCast& c, void* stream) {
  const char* op = op_of(c);
  const Job job = make_job(c);
  const int64_t tiles = job.slots * job.to.padded.across;
  if (c.grain == Grain::row) return run_rows<X>(op, c, job, tiles, stream);
  if (c.grain == Grain::block) return launch(op, cast_rows_kernel<X>, tiles, kThreads, stream, job);
  if (measures_groups(c))
    launch(op, measure_groups_kernel<X>, int64_t(job.slots) * job.parts, kThreads, stream, job);
  launch(op, cast_groups_kernel<X>, tiles, kThreads, stream, job);
}

void check_codes(const GroupedCast& c, const char* name, const TensorView& codes, int64_t rows,
                 int64_t cols) {
  const char* op = op_of(c);
  QUAVER_CHECK(is_fp8(codes.dtype) && codes.dtype == c.q.dtype, op,
               ": dtype of q and qt must be e4m3 or e5m2, got ", name_of(codes.dtype));
  if (codes.data == nullptr) return;
  QUAVER_CHECK(codes.rows == rows && codes.cols == cols, op, ": ", name, " must be [", rows, ", ",
               cols, "], got [", codes.rows, ", ", codes.cols, "]");
}

void check(const GroupedCast& c) {
  const char* op = op_of(c);
  QUAVER_CHECK(!is_fp8(c.x.dtype), op, ": x must be f32, f16 or bf16, got ", name_of(c.x.dtype));
  QUAVER_CHECK(c.stack || c.grain != Grain::tile, op, ": tiles are those of stacks alone");
  QUAVER_CHECK(!c.tiles_t || (c.grain == Grain::block && !c.stack), op,
               ": tiles_t goes with blocks of rows alone");
  QUAVER_CHECK(!c.given || c.grain == Grain::tensor, op,
               ": a given scale goes with granularity tensor alone");
  QUAVER_CHECK(c.workspace != nullptr || !measures_groups(c), op, ": no workspace");
  for (const int64_t size : {c.x.rows, c.x.cols, width_of(c)})
    QUAVER_CHECK(size <= kGemmMaxSize, op, ": sizes reach ", kGemmMaxSize, ", got ", size);
  const int64_t rows = c.stack ? c.groups * gemm_padded(rows_of(c)) : c.x.rows;
  const int64_t cols = gemm_padded(c.x.cols);
  check_codes(c, "q", c.q, rows, cols);
  check_codes(c, "qt", c.qt, c.stack ? c.groups * cols : cols, width_of(c));
}

}  // namespace

int64_t cast_groups_workspace_bytes(const GroupedCast& c) {
  return measures_groups(c) ? slots_of(c) * parts_of(c) * int64_t(sizeof(uint32_t)) : 0;
}

void cast_groups(const GroupedCast& c, void* stream) {
  if (c.stack && c.groups == 0) return;  // whose matrices' size is not in the views
  check(c);
  const bool fine = c.grain == Grain::block || c.grain == Grain::tile;
  if (fine && (c.x.cols == 0 || (c.stack && c.x.rows == 0))) return;  // no codes and no scales
  with_float(c.x.dtype, [&](auto type) { run<decltype(type)>(c, stream); });
}

}  // namespace quaver::cuda
