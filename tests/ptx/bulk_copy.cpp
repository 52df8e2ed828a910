// cp.async.bulk.tensor: boxes of a tensor to the shared memory of CTAs, and back; groups of copies.
#include <algorithm>
#include <cstring>

#include "access.h"
#include "decode.h"
#include "quaver/check.h"

namespace quaver::ptx {

namespace {

constexpr uint32_t kChunk = 16;  // bytes that a swizzle keeps together

// Global memory of a row of a box, which a copy must find within one buffer.
class Rows {
 public:
  explicit Rows(const Memory& memory) : memory_(memory) {}
  unsigned char* at(uint64_t address, uint64_t bytes, bool writes) {
    if (!known_.holds(address, bytes)) known_ = memory_.find(address);
    if (!known_.holds(address, bytes) || (writes && !known_.writable))
      fail("a copy by tensor map touches ", bytes,
           " bytes of global memory outside of every buffer", ", at ", memory_.describe(address));
    return reinterpret_cast<unsigned char*>(address);
  }

 private:
  const Memory& memory_;
  Range known_;
};

// Calls f(offset in the box, address in global memory, first, end) for each row of a box; elements
// from `first` to `end` lie inside of the tensor.
template <class F>
void for_rows(const TensorMap& m, const Coordinates& at, F f) {
  const auto inside = [&](int axis, int64_t i) {
    return i >= 0 && i < static_cast<int64_t>(m.sizes[axis]);
  };
  const int64_t width = m.box[0], left = static_cast<int64_t>(m.sizes[0]) - at[0];
  const int64_t first = std::clamp<int64_t>(-int64_t(at[0]), 0, width);
  const int64_t last = std::max(first, std::min(width, left));
  uint64_t offset = 0;
  int64_t i[5] = {};
  const uint64_t rows = m.box_bytes() / m.element_bytes / m.box[0];
  for (uint64_t row = 0; row < rows; ++row, offset += width * m.element_bytes) {
    uint64_t rest = row, address = m.address + int64_t(at[0]) * m.element_bytes;
    bool within = true;
    for (int axis = 1; axis < 5; ++axis) {
      i[axis] = at[axis] + static_cast<int64_t>(rest % m.box[axis]);
      rest /= m.box[axis];
      within = within && inside(axis, i[axis]);
      address += i[axis] * m.strides[axis - 1];
    }
    f(offset, address, within ? first : 0, within ? last : 0);
  }
}

void land(Machine* machine, Cluster* cluster, const Load& load) {
  Rows rows(machine->memory);
  const TensorMap& m = load.map;
  const uint32_t size = m.element_bytes;
  for (size_t rank = 0; rank < cluster->ctas.size(); ++rank) {
    if (!(load.ctas >> rank & 1)) continue;
    Cta& cta = *cluster->ctas[rank];
    if (!cta.live()) fail("a copy lands in a CTA that has ended");
    cta.shared.release(load.to, load.bytes(), Access::write);
    for_rows(m, load.at, [&](uint64_t offset, uint64_t address, int64_t first, int64_t end) {
      std::vector<unsigned char> row(uint64_t(m.box[0]) * size);
      if (end > first)
        std::memcpy(row.data() + first * size,
                    rows.at(address + first * size, (end - first) * size, false),
                    (end - first) * size);
      for (uint32_t i = 0; i < row.size(); i += kChunk) {
        const uint32_t to = swizzled(static_cast<uint32_t>(load.to + offset + i), m.swizzle);
        std::memcpy(cta.shared.copy(to, kChunk, Access::write), row.data() + i, kChunk);
      }
    });
    mbarrier_at(cta, load.barrier).complete(static_cast<int64_t>(load.bytes()));
  }
}

void perform(Machine* machine, Cta* cta, const Store& store) {
  Rows rows(machine->memory);
  const TensorMap& m = store.map;
  const uint32_t size = m.element_bytes;
  for_rows(m, store.at, [&](uint64_t offset, uint64_t address, int64_t first, int64_t end) {
    if (end <= first) return;
    std::vector<unsigned char> row(uint64_t(m.box[0]) * size);
    for (uint32_t i = 0; i < row.size(); i += kChunk) {
      const uint32_t from = swizzled(static_cast<uint32_t>(store.from + offset + i), m.swizzle);
      std::memcpy(row.data() + i, cta->shared.copy(from, kChunk, Access::read), kChunk);
    }
    std::memcpy(rows.at(address + first * size, (end - first) * size, true),
                row.data() + first * size, (end - first) * size);
  });
}

// in.more holds the coordinates; in.also, of a multicast, the mask of CTAs.
Coordinates coordinates_of(const Warp& w, const Instruction& in, int lane) {
  Coordinates at{};
  for (size_t i = 0; i < in.more.size(); ++i)
    at[i] = static_cast<int32_t>(w.at<uint32_t>(in.more[i])[lane]);
  return at;
}

void check_shared(uint32_t address) {
  if (address >= kClusterWindow) fail("a copy to another CTA's shared memory without multicast");
  if (address % 128 != 0) fail("a box at byte ", address, " of shared memory, no multiple of 128");
}

TensorMap map_of(const Warp& w, const Instruction& in, int lane) {
  const TensorMap map = tensor_map_at(w.at<uint64_t>(in.b)[lane]);
  if (map.rank != in.more.size())
    fail("a tensor map of ", int(map.rank), " axes with ", in.more.size(), " coordinates");
  return map;
}

template <bool multicast>
void load_box(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    Load load;
    load.map = map_of(w, in, i);
    load.at = coordinates_of(w, in, i);
    load.to = w.at<uint32_t>(in.a)[i];
    load.barrier = w.at<uint32_t>(in.c)[i];
    check_shared(load.to);
    Cluster& cluster = *w.cta->cluster;
    load.ctas = multicast ? uint32_t(w.at<uint16_t>(in.also)[i]) : 1u << w.cta->rank;
    if (load.ctas == 0 || load.ctas >> cluster.ctas.size() != 0)
      fail("a multicast to CTAs that are not in the cluster: mask ", load.ctas);
    for (size_t rank = 0; rank < cluster.ctas.size(); ++rank)
      if (load.ctas >> rank & 1)
        cluster.ctas[rank]->shared.hold(load.to, load.bytes(), Access::write);
    if (w.machine->launch->timing.late_loads)
      cluster.loads.push_back(load);
    else
      land(w.machine, &cluster, load);
  });
}

void store_box(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    Store store;
    store.map = map_of(w, in, i);
    store.at = coordinates_of(w, in, i);
    store.from = w.at<uint32_t>(in.a)[i];
    check_shared(store.from);
    w.cta->shared.hold(store.from, store.map.box_bytes(), Access::read);
    w.cta->shared.check_fenced(store.from, store.map.box_bytes());
    if (!w.machine->launch->timing.late_stores) perform(w.machine, w.cta, store);
    w.cta->stores[w.thread(i)].open.push_back(store);
  });
}

void commit_stores(Warp& w, const Instruction&, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    StoreQueue& queue = w.cta->stores[w.thread(i)];
    queue.groups.push_back(std::move(queue.open));
    queue.open.clear();
  });
}

void wait_stores(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    auto& groups = w.cta->stores[w.thread(i)].groups;
    for (; groups.size() > static_cast<size_t>(in.displacement); groups.pop_front())
      for (const Store& store : groups.front()) {
        w.cta->shared.release(store.from, store.map.box_bytes(), Access::read);
        if (w.machine->launch->timing.late_stores) perform(w.machine, w.cta, store);
      }
  });
}

bool decode_box(Decoder& d, const Statement& s, Instruction* in) {
  check_modifiers(s, {"async", "bulk", "tensor", "1d", "2d", "3d", "4d", "5d", "shared::cluster",
                      "shared::cta", "global", "mbarrier::complete_tx::bytes", "bulk_group",
                      "multicast::cluster", "L2::cache_hint"});
  const bool stores = s.has("bulk_group"), multicast = s.has("multicast::cluster");
  const size_t least = stores ? 2 : multicast ? 4 : 3;
  check_operands(s, least + s.has("L2::cache_hint"));
  const Operand &map = s.operands[stores ? 0 : 1], &shared = s.operands[stores ? 1 : 0];
  if (map.kind != Operand::Kind::memory || map.parts.size() != 2 || map.value != 0 ||
      shared.kind != Operand::Kind::memory || shared.value != 0)
    fail("operands of a form that is not supported");
  for (const Operand& coordinate : map.parts[1].parts) in->more.push_back(d.source(coordinate, 4));
  in->b = d.source(map.parts[0], 8);
  in->a = d.source(shared.parts.at(0), 4);
  if (!stores) in->c = d.source(s.operands[2].parts.at(0), 4);
  if (multicast) in->also = d.source(s.operands[3], 2);
  in->run = stores ? store_box : multicast ? load_box<true> : load_box<false>;
  return true;
}

}  // namespace

bool land_one(Machine* machine) {
  const Timing& timing = machine->launch->timing;
  if (timing.descending && land_group(machine)) return true;
  for (const auto& cluster : machine->clusters()) {
    std::vector<Load>& loads = cluster->loads;
    if (loads.empty()) continue;
    const auto at = timing.descending ? loads.end() - 1 : loads.begin();
    const Load load = *at;
    loads.erase(at);
    land(machine, cluster.get(), load);
    return true;
  }
  return !timing.descending && land_group(machine);
}

void check_settled(const Cta& cta) {
  for (const auto& [thread, queue] : cta.stores)
    if (!queue.open.empty() || !queue.groups.empty())
      fail("ptx: block ", cta.index, " ends before copies of thread ", thread,
           " from its shared memory were waited for");
  for (const Warp& w : cta.warps)
    if (!w.products.empty())
      fail("ptx: block ", cta.index, " ends before products of warp ", w.index, " were waited for");
  for (const Load& load : cta.cluster->loads)
    if (load.ctas >> cta.rank & 1)
      fail("ptx: block ", cta.index, " ends before a copy to its shared memory has landed");
  for (const CopyGroup& group : cta.cluster->groups)
    if (group.rank == cta.rank)
      fail("ptx: block ", cta.index, " ends before a copy to its shared memory has landed");
  const auto empty = [](const std::vector<ElementCopy>& group) { return group.empty(); };
  for (const auto& [thread, queue] : cta.copies) {
    if (!queue.open.empty())
      fail("ptx: block ", cta.index, " ends, and copies of thread ", thread,
           " to its shared memory were told to no mbarrier and committed to no group");
    if (!std::all_of(queue.groups.begin(), queue.groups.end(), empty))
      fail("ptx: block ", cta.index, " ends before copies of thread ", thread,
           " to its shared memory were waited for");
  }
}

bool decode_bulk_copy(Decoder& d, const Statement& s, Instruction* in) {
  if (s.opcode[0] != "cp" || !s.has("bulk")) return false;
  if (s.has("tensor")) return decode_box(d, s, in);
  check_modifiers(s, {"async", "bulk", "commit_group", "wait_group", "read"});
  if (s.has("commit_group")) {
    check_operands(s, 0);
    in->run = commit_stores;
    return true;
  }
  check_operands(s, 1);
  if (!s.has("wait_group") || s.operands[0].kind != Operand::Kind::immediate) return false;
  in->displacement = static_cast<int64_t>(s.operands[0].value);
  in->run = wait_stores;
  return true;
}

}  // namespace quaver::ptx
