#include "machine.h"

#include <algorithm>
#include <cstring>

#include "quaver/check.h"

namespace quaver::ptx {

namespace {

constexpr size_t kAlign = 64;
constexpr unsigned char kPoison = 0xdb;  // of registers that nothing has written
constexpr int kPatience = 3;             // rounds of polling alone that show a hang

unsigned char* aligned(std::vector<uint64_t>* storage) {
  const auto start = reinterpret_cast<uintptr_t>(storage->data());
  return reinterpret_cast<unsigned char*>((start + kAlign - 1) / kAlign * kAlign);
}

Dim coordinates(int64_t index, const Dim& of) {
  const int64_t x = of.x, y = of.y;
  return {static_cast<uint32_t>(index % x), static_cast<uint32_t>(index / x % y),
          static_cast<uint32_t>(index / x / y)};
}

Dim clusters_of(const Launch& l) {
  const Dim &g = l.grid, &c = l.cluster;
  if (g.x % c.x != 0 || g.y % c.y != 0 || g.z % c.z != 0)
    fail("ptx: a grid of ", g.x, " x ", g.y, " x ", g.z, " is no multiple of its clusters of ", c.x,
         " x ", c.y, " x ", c.z);
  return {g.x / c.x, g.y / c.y, g.z / c.z};
}

// The value of a special register that has an x, a y and a z.
bool find_special(const std::string& name, const Dim& value, uint32_t* found) {
  const size_t dot = name.size() - 2;
  *found = name[dot + 1] == 'x' ? value.x : name[dot + 1] == 'y' ? value.y : value.z;
  return name[dot] == '.';
}

uint32_t special_value(const std::string& name, const Warp& w, int lane, const Launch& launch) {
  const Cta& cta = *w.cta;
  const auto thread = static_cast<uint32_t>(w.thread(lane));
  const Dim &at = cta.at, &of = launch.cluster;
  const Dim values[] = {{thread, 0, 0},
                        {static_cast<uint32_t>(launch.threads), 1, 1},
                        at,
                        launch.grid,
                        {at.x % of.x, at.y % of.y, at.z % of.z},
                        of,
                        {at.x / of.x, at.y / of.y, at.z / of.z},
                        clusters_of(launch)};
  const char* const names[] = {"%tid.",       "%ntid.",          "%ctaid.",
                               "%nctaid.",    "%cluster_ctaid.", "%cluster_nctaid.",
                               "%clusterid.", "%nclusterid."};
  uint32_t value = 0;
  for (size_t i = 0; i < std::size(names); ++i)
    if (name.size() == std::strlen(names[i]) + 1 &&
        name.compare(0, name.size() - 1, names[i]) == 0 && find_special(name, values[i], &value))
      return value;
  if (name == "%laneid") return static_cast<uint32_t>(lane);
  if (name == "%warpid") return static_cast<uint32_t>(w.index);
  if (name == "%cluster_ctarank") return cta.rank;
  fail("ptx: the special register ", name, " is not supported");
}

}  // namespace

bool Cta::live() const {
  return std::any_of(warps.begin(), warps.end(), [](const Warp& w) { return w.live != 0; });
}

bool Cluster::live() const {
  return std::any_of(ctas.begin(), ctas.end(), [](const auto& cta) { return cta->live(); });
}

Machine::Machine(const Program& program_, const Memory& memory_)
    : program(program_), memory(memory_) {
  counts_.executed.assign(program.code.size(), 0);
}

void Machine::run(const Launch& launch_) {
  if (launch_.threads < 1 || launch_.threads > 1024)
    fail("ptx: cannot launch blocks of ", launch_.threads, " threads");
  launch = &launch_;
  ranges.assign(program.code.size(), Range{});
  prepare();
  size_t next = 0;
  for (int idle = 0; refill(&next);) {
    if (round(false) || (launch->timing.late_cta >= 0 && round(true)) || land_one(this))
      idle = 0;
    else if (++idle == kPatience)
      report_hang("hangs");
  }
  counts_.instructions = 0;
  for (const uint64_t n : counts_.executed) counts_.instructions += n;
}

void Machine::prepare() {
  const size_t resident = std::min(static_cast<size_t>(launch->resident), launch->chosen.size());
  while (clusters_.size() < resident) clusters_.emplace_back(new Cluster);
  clusters_.resize(resident);
  const auto ctas = static_cast<size_t>(launch->cluster.count());
  for (const auto& cluster : clusters_) {
    cluster->loads.clear();
    cluster->groups.clear();
    while (cluster->ctas.size() < ctas) cluster->ctas.emplace_back(new Cta);
    cluster->ctas.resize(ctas);
    for (size_t rank = 0; rank < ctas; ++rank) {
      Cta& cta = *cluster->ctas[rank];
      cta.cluster = cluster.get();
      cta.rank = static_cast<uint32_t>(rank);
      cta.threads = launch->threads;
      prepare(&cta);
    }
  }
}

void Machine::prepare(Cta* cta) {
  cta->stores.clear();
  cta->copies.clear();
  cta->warps.resize((cta->threads + kLanes - 1) / kLanes);
  auto* constants = const_cast<uint64_t*>(program.constants.data());  // no result goes there
  for (size_t i = 0; i < cta->warps.size(); ++i) {
    Warp& w = cta->warps[i];
    w.cta = cta;
    w.machine = this;
    w.index = static_cast<int>(i);
    w.live = 0;
    w.products = {};
    if (w.storage.empty()) {
      w.storage.resize((program.register_bytes + 2 * kAlign) / sizeof(uint64_t));
      std::memset(w.storage.data(), kPoison, w.storage.size() * sizeof(uint64_t));
    }
    w.banks[0] = aligned(&w.storage);
    w.banks[1] = reinterpret_cast<unsigned char*>(constants);
  }
}

// Starts the next clusters where others have ended; false when all are done.
bool Machine::refill(size_t* next) {
  bool alive = false;
  for (const auto& cluster : clusters_) {
    if (!cluster->live()) {
      for (const auto& cta : cluster->ctas) check_settled(*cta);
      if (*next < launch->chosen.size()) start(cluster.get(), launch->chosen[(*next)++]);
    }
    alive = alive || cluster->live();
  }
  return alive;
}

void Machine::start(Cluster* cluster, int64_t index) {
  const Dim at = coordinates(index, clusters_of(*launch)), of = launch->cluster,
            grid = launch->grid;
  cluster->loads.clear();
  cluster->groups.clear();
  cluster->arrived = 0;
  cluster->used = 0;
  for (const auto& cta : cluster->ctas) {
    const Dim inside = coordinates(cta->rank, of);
    cta->at = {at.x * of.x + inside.x, at.y * of.y + inside.y, at.z * of.z + inside.z};
    cta->index = cta->at.x + (int64_t(cta->at.y) + int64_t(cta->at.z) * grid.y) * grid.x;
    start(cta.get());
  }
}

void Machine::start(Cta* cta) {
  const Kernel& k = program.kernel;
  const uint64_t shared = std::max(k.shared_bytes, k.dynamic_shared + launch->dynamic_shared);
  cta->shared.start(shared, launch->threads, !program.asynchronous);
  cta->local.assign(k.local_bytes * cta->threads, kPoison);
  cta->mbarriers.clear();
  cta->stores.clear();
  cta->copies.clear();
  for (Barrier& b : cta->barriers) b = {};
  for (Warp& w : cta->warps) {
    const int threads = std::min(kLanes, cta->threads - w.index * kLanes);
    w.live = w.lanes = 0xffffffffu >> (kLanes - threads);
    w.pc = 0;
    w.wait = Wait::none;
    w.others.clear();
    w.products = {};
    w.unfenced = true;
    for (const Special& s : program.specials)
      for (int lane = 0; lane < kLanes; ++lane)
        w.at<uint32_t>(s.slot)[lane] = special_value(s.name, w, lane, *launch);
  }
}

}  // namespace quaver::ptx
