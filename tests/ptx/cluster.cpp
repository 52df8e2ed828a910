// Clusters: mapa and barrier.cluster.
#include "access.h"
#include "decode.h"
#include "quaver/check.h"

namespace quaver::ptx {

namespace {

void map_address(Warp& w, const Instruction& in, uint32_t lanes) {
  const uint32_t *address = w.at<uint32_t>(in.a), *rank = w.at<uint32_t>(in.b);
  uint32_t* to = w.at<uint32_t>(in.to);
  const size_t ctas = w.cta->cluster->ctas.size();
  for_lanes(lanes, [&](int i) {
    if (rank[i] >= ctas) fail("there is no CTA ", rank[i], " in a cluster of ", ctas);
    to[i] = address[i] % kClusterWindow + (rank[i] + 1) * kClusterWindow;
  });
}

template <bool aligned>
void arrive_cluster(Warp& w, const Instruction&, uint32_t lanes) {
  if (aligned) check_aligned(w, lanes);
  Cluster& cluster = *w.cta->cluster;
  w.phase = cluster.phase;
  cluster.arrived += __builtin_popcount(lanes);
  if (cluster.arrived < w.cta->threads * static_cast<int>(cluster.ctas.size())) return;
  cluster.arrived = 0;
  ++cluster.phase;
}

template <bool aligned>
void wait_cluster(Warp& w, const Instruction&, uint32_t lanes) {
  if (aligned) check_aligned(w, lanes);
  if (w.phase == w.cta->cluster->phase) poll(&w, w.pc);
}

}  // namespace

Cta& owner_of(Warp& w, uint32_t* address) {
  const uint32_t window = *address / kClusterWindow;
  *address %= kClusterWindow;
  if (window == 0) return *w.cta;
  const Cluster& cluster = *w.cta->cluster;
  if (window > cluster.ctas.size()) fail("address ", *address, " of CTA ", window - 1);
  Cta& cta = *cluster.ctas[window - 1];
  if (!cta.live())
    fail("the shared memory of CTA ", window - 1, " of the cluster, which has ended");
  return cta;
}

bool decode_cluster(Decoder& d, const Statement& s, Instruction* in) {
  if (s.opcode[0] == "mapa") {
    check_modifiers(s, {"shared::cluster"});
    check_operands(s, 3);
    if (type_at(s) != Type::u32) return false;
    in->to = d.result(s.operands[0], 4);
    in->a = d.source(s.operands[1], 4);
    in->b = d.source(s.operands[2], 4);
    in->run = map_address;
    return true;
  }
  if (s.opcode[0] != "barrier" || !s.has("cluster")) return false;
  check_modifiers(s, {"cluster", "arrive", "wait", "aligned", "relaxed", "release", "acquire"});
  check_operands(s, 0);
  if (s.has("aligned"))
    in->run = s.has("arrive") ? arrive_cluster<true> : wait_cluster<true>;
  else
    in->run = s.has("arrive") ? arrive_cluster<false> : wait_cluster<false>;
  return true;
}

}  // namespace quaver::ptx
