// wgmma: 64 x N x 32 products of FP8 operands in shared memory, of which each of the four warps of
// a warpgroup computes 16 rows. PTX ISA, 9.7.15.
#include <algorithm>
#include <cstring>

#include "access.h"
#include "decode.h"
#include "quaver/check.h"
#include "tensor_core.h"

namespace quaver::ptx {

namespace {

constexpr int kRows = 16, kWarps = 4, kSwizzle128 = 1;
constexpr int64_t kSecondA = 1, kSecondB = 2;  // in.displacement: e5m2, not e4m3

// A matrix descriptor (table 42): rows of 128 bytes, swizzled, in groups of eight.
struct Descriptor {
  uint32_t start, group_stride;
  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        group_stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != kSwizzle128) fail("a matrix descriptor without the swizzle of 128 bytes");
    if ((bits >> 49 & 7) != 0) fail("a matrix descriptor with a base offset");
  }
  uint32_t row(int i) const { return start + i / 8 * group_stride + i % 8 * 128; }
  uint64_t bytes(int rows) const { return row(rows - 1) + kProductDepth - start; }
};

// Decoded values, those of one step of K side by side.
template <int rows>
void fetch(SharedMemory* shared, const Descriptor& d, int first, int count, bool e5m2,
           float (&to)[kProductDepth][rows]) {
  constexpr int kChunk = 16;
  const float* values = fp8_values(e5m2);
  for (int i = 0; i < count; ++i)
    for (int k = 0; k < kProductDepth; k += kChunk) {
      const uint32_t from = swizzled(d.row(first + i) + static_cast<uint32_t>(k), 3);
      const unsigned char* codes = shared->copy(from, kChunk, Access::read);
      for (int j = 0; j < kChunk; ++j) to[k + j][i] = values[codes[j]];
    }
}

int rows_of_b(const Instruction& in) { return static_cast<int>(in.more.size()) * 2; }

// Lane 4 (row % 8) + (column % 8) / 2 holds an element, in figure 148's order of registers.
void compute(Warp& w, const Product& p) {
  const Instruction& in = *p.in;
  const int columns = rows_of_b(in);
  static thread_local float a[kProductDepth][kRows], b[kProductDepth][kProductColumns];
  fetch(&w.cta->shared, Descriptor(p.a), w.index % kWarps * kRows, kRows,
        in.displacement & kSecondA, a);
  fetch(&w.cta->shared, Descriptor(p.b), 0, columns, in.displacement & kSecondB, b);
  const bool cut = w.machine->launch->timing.cut_sums;
  for (int row = 0; row < kRows; ++row) {
    float sums[kProductColumns] = {}, column_of_a[kProductDepth];
    for (int k = 0; k < kProductDepth; ++k) column_of_a[k] = a[k][row];
    const auto element = [&](int column) {
      const Slot& s = in.more[column / 8 * 4 + row / 8 * 2 + column % 2];
      return w.at<float>(s) + row % 8 * 4 + column % 8 / 2;
    };
    if (p.adds)
      for (int column = 0; column < columns; ++column) sums[column] = *element(column);
    (cut ? add_cut : add_exact)(sums, column_of_a, b, columns);
    for (int column = 0; column < columns; ++column) *element(column) = sums[column];
  }
}

void hold(Warp& w, const Product& p, bool begins) {
  const Descriptor a(p.a), b(p.b);
  SharedMemory& shared = w.cta->shared;
  const auto change = [&](uint64_t address, uint64_t bytes) {
    begins ? shared.hold(address, bytes, Access::read)
           : shared.release(address, bytes, Access::read);
  };
  change(a.row(w.index % kWarps * kRows), a.bytes(kRows));
  change(b.start, b.bytes(rows_of_b(*p.in)));
}

void start_product(Warp& w, const Instruction& in, uint32_t lanes) {
  check_aligned(w, lanes);
  if (w.unfenced) fail("a product with no wgmma.fence since its accumulators were touched");
  Product p;
  p.in = &in;
  p.a = uniform64(w, in.a, lanes);
  p.b = uniform64(w, in.b, lanes);
  const uint32_t adds = w.predicate(in.c) & lanes;
  if (adds != 0 && adds != lanes) fail("an operand differs between the lanes of a warp");
  p.adds = adds != 0;
  hold(w, p, true);
  if (!w.machine->launch->timing.late_products) compute(w, p);
  w.products.open.push_back(p);
}

void commit_products(Warp& w, const Instruction&, uint32_t lanes) {
  check_aligned(w, lanes);
  w.products.groups.push_back(std::move(w.products.open));
  w.products.open.clear();
}

void wait_products(Warp& w, const Instruction& in, uint32_t lanes) {
  check_aligned(w, lanes);
  auto& groups = w.products.groups;
  for (; groups.size() > static_cast<size_t>(in.displacement); groups.pop_front())
    for (const Product& p : groups.front()) {
      if (w.machine->launch->timing.late_products) compute(w, p);
      hold(w, p, false);
    }
}

void fence_products(Warp& w, const Instruction&, uint32_t lanes) {
  check_aligned(w, lanes);
  w.unfenced = false;
}

bool same(const Slot& a, const Slot& b) {
  return a.size != 0 && a.bank == b.bank && a.offset == b.offset;
}

template <class F>
bool any_slot(const Instruction& in, F f) {
  return f(in.to) || f(in.also) || f(in.a) || f(in.b) || f(in.c) ||
         std::any_of(in.more.begin(), in.more.end(), f);
}

// wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e5m2 d, a, b, adds, 1, 1
bool decode_product(Decoder& d, const Statement& s, Instruction* in) {
  if (s.opcode.size() != 8 || s.opcode[5] != "f32") return false;
  const std::string &shape = s.opcode[4], &a = s.opcode[6], &b = s.opcode[7];
  const auto is_fp8 = [](const std::string& type) { return type == "e4m3" || type == "e5m2"; };
  if (!is_fp8(a) || !is_fp8(b)) return false;
  check_operands(s, 6);
  const std::vector<Operand>& sums = s.operands[0].parts;
  if (shape != "m64n" + std::to_string(sums.size() * 2) + "k32" || sums.size() % 4 != 0 ||
      sums.size() * 2 > kProductColumns)
    fail("accumulators that do not fit the shape");
  for (const Operand& one : sums) in->more.push_back(d.result(one, 4));
  in->a = d.source(s.operands[1], 8);
  in->b = d.source(s.operands[2], 8);
  in->c = d.source(s.operands[3], 0);
  for (size_t i = 4; i < 6; ++i)
    if (s.operands[i].kind != Operand::Kind::immediate || s.operands[i].value != 1)
      fail("a negated operand");
  in->displacement = (a == "e5m2" ? kSecondA : 0) | (b == "e5m2" ? kSecondB : 0);
  in->run = start_product;
  return true;
}

}  // namespace

void mark_accumulators(Program* program) {
  std::vector<bool> accumulators(program->register_bytes);
  for (const Instruction& in : program->code)
    if (in.run == start_product)
      for (const Slot& s : in.more) accumulators[s.offset] = true;
  for (Instruction& in : program->code)
    in.touches_sums = in.run != start_product && any_slot(in, [&](const Slot& s) {
                        return s.size != 0 && s.bank == 0 && accumulators[s.offset];
                      });
}

void touch_accumulators(Warp* w, const Instruction& in) {
  w->unfenced = true;
  const auto check = [&](const Product& p) {
    for (const Slot& sum : p.in->more)
      if (any_slot(in, [&](const Slot& s) { return same(s, sum); }))
        fail("an accumulator is touched before its product was waited for");
  };
  for (const Product& p : w->products.open) check(p);
  for (const auto& group : w->products.groups)
    for (const Product& p : group) check(p);
}

bool decode_wgmma(Decoder& d, const Statement& s, Instruction* in) {
  if (s.opcode[0] != "wgmma") return false;
  if (s.has("mma_async")) return decode_product(d, s, in);
  check_modifiers(s, {"fence", "commit_group", "wait_group", "sync", "aligned"});
  const bool waits = s.has("wait_group");
  check_operands(s, waits);
  if (waits) in->displacement = static_cast<int64_t>(s.operands[0].value);
  in->run = waits ? wait_products : s.has("fence") ? fence_products : commit_products;
  return true;
}

}  // namespace quaver::ptx
