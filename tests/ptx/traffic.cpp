#include "traffic.h"

#include <algorithm>
#include <vector>

namespace quaver::ptx {

namespace {

constexpr uint64_t kSector = 32, kBanks = 32, kWord = 4;

// The distinct units of `size` bytes that the accesses touch.
std::vector<uint64_t> touched(const uint64_t* addresses, int count, uint64_t bytes, uint64_t size) {
  std::vector<uint64_t> units;
  for (int i = 0; i < count; ++i)
    for (uint64_t u = addresses[i] / size; u <= (addresses[i] + bytes - 1) / size; ++u)
      units.push_back(u);
  std::sort(units.begin(), units.end());
  units.erase(std::unique(units.begin(), units.end()), units.end());
  return units;
}

}  // namespace

void count_global(Traffic* t, const uint64_t* addresses, int count, uint64_t bytes, bool writes) {
  // Lanes that name the same bytes need them once.
  const uint64_t distinct = touched(addresses, count, bytes, bytes).size() * bytes;
  (writes ? t->written : t->read) += distinct;
  t->sectors += touched(addresses, count, bytes, kSector).size();
  t->least_sectors += (distinct + kSector - 1) / kSector;
}

// Lanes go together as long as they name no more than one word of each bank: 32 lanes of 4 bytes,
// 16 of 8 or 8 of 16.
void count_shared(Traffic* t, const uint64_t* addresses, int count, uint64_t bytes) {
  const int together = static_cast<int>(kBanks * kWord / std::max(bytes, kWord));
  for (int first = 0; first < count; first += together) {
    const int lanes = std::min(together, count - first);
    uint64_t words[kBanks] = {}, most = 0;
    for (const uint64_t word : touched(addresses + first, lanes, bytes, kWord))
      most = std::max(most, ++words[word % kBanks]);
    t->passes += most;
    t->least_passes += 1;
  }
}

}  // namespace quaver::ptx
