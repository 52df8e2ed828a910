#include "memory.h"

#include <sstream>

#include "quaver/check.h"

namespace quaver::ptx {

void Memory::add(const void* start, size_t bytes, bool writable) {
  const auto first = reinterpret_cast<uint64_t>(start);
  blocks_[first] = {first, first + bytes, writable};
}

void Memory::remove(const void* start) { blocks_.erase(reinterpret_cast<uint64_t>(start)); }

void Memory::narrow(const void* start, size_t bytes) {
  const auto first = reinterpret_cast<uint64_t>(start);
  const auto found = block_below(first);
  if (found == blocks_.end() || !found->second.holds(first, bytes))
    fail("ptx: ", start, " is in no registered memory");
  Range& range = blocks_[found->first];
  range.first = first;
  range.end = first + bytes;
}

Memory::Blocks::const_iterator Memory::block_below(uint64_t address) const {
  const auto above = blocks_.upper_bound(address);
  return above == blocks_.begin() ? blocks_.end() : std::prev(above);
}

Range Memory::find(uint64_t address) const {
  const auto found = block_below(address);
  if (found == blocks_.end() || !found->second.holds(address, 1)) return {};
  return found->second;
}

std::string Memory::describe(uint64_t address) const {
  std::ostringstream text;
  text << "0x" << std::hex << address << std::dec;
  const auto above = blocks_.upper_bound(address);
  const auto below = block_below(address);
  if (below != blocks_.end() && address >= below->second.first) {
    const Range& r = below->second;
    text << ", byte " << address - r.first << " of a buffer of " << r.end - r.first;
  } else if (below != blocks_.end() || above != blocks_.end()) {
    const Range& r = below != blocks_.end() ? below->second : above->second;
    text << ", " << r.first - address << " bytes before a buffer of " << r.end - r.first;
  }
  return text.str();
}

}  // namespace quaver::ptx
