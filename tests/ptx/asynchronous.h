// What goes on beside the instructions of a warp: copies by tensor map and matrix products that
// were started and not waited for, and the mbarriers by which copies tell that they are done. When
// each of them happens is the launch's choice, between at once and as late as a wait permits.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "tensor_map.h"

namespace quaver::ptx {

class Machine;
struct Cluster;
struct Cta;
struct Instruction;
struct Program;
struct Warp;

struct Timing {
  bool late_loads = false;     // copies to shared memory land when no warp can go on
  bool late_stores = false;    // copies from shared memory read it where they are waited for
  bool late_products = false;  // products are computed where they are waited for
  int late_cta = -1;           // CTAs of this rank run when no other can go on
  bool descending = false;     // the order of CTAs and of copies that land
  bool cut_sums = false;       // products are summed as by the tensor core, not exactly
};

// PTX ISA, 9.7.13.15: a phase ends when all arrivals and bytes that it expects have come.
struct Mbarrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  void arrive(int count);
  void expect(int64_t more);
  void complete(int64_t count);

 private:
  void end_phase();
};

// A copy of a box to the shared memory of the CTAs that the mask names, at the same place in each.
struct Load {
  TensorMap map;
  Coordinates at{};
  uint32_t to = 0, barrier = 0;
  uint32_t ctas = 0;
  uint64_t bytes() const { return map.box_bytes(); }
};

// A thread's copy of a few bytes to its CTA's shared memory, with zeros behind those that it reads.
struct ElementCopy {
  uint64_t from = 0;
  uint32_t to = 0, bytes = 0, read = 0;
  int thread = 0;
};

// Those of one thread whose end an mbarrier of its CTA is told.
struct CopyGroup {
  uint32_t rank = 0, barrier = 0;
  std::vector<ElementCopy> copies;
};

// Those of one thread that no mbarrier knows of: the thread itself waits for them, by groups.
struct CopyQueue {
  std::vector<ElementCopy> open;
  std::deque<std::vector<ElementCopy>> groups;
};

struct Store {
  TensorMap map;
  Coordinates at{};
  uint32_t from = 0;
};

struct StoreQueue {
  std::vector<Store> open;
  std::deque<std::vector<Store>> groups;
};

// One warp's part of wgmma.mma_async.
struct Product {
  const Instruction* in = nullptr;
  uint64_t a = 0, b = 0;  // descriptors of the operands
  bool adds = false;      // to what is in the accumulators
};

struct ProductQueue {
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  bool empty() const { return open.empty() && groups.empty(); }
};

// The mbarrier at an address of the CTA's shared memory; an error where none was initialised.
Mbarrier& mbarrier_at(Cta& cta, uint32_t address);

// Lands one copy that is as late as it may be, now that no warp can go on; false where none is
// left.
bool land_one(Machine* machine);
// The same of the copies of one thread.
bool land_group(Machine* machine);
// Refuses a CTA that ends before what it started has ended.
void check_settled(const Cta& cta);
// Marks the instructions that touch accumulators.
void mark_accumulators(Program* program);
// Refuses one of them that does not wait for the product.
void touch_accumulators(Warp* warp, const Instruction& in);

}  // namespace quaver::ptx
