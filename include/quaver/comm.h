// A communicator of our own over the NCCL that is there at run time: the library neither links
// NCCL nor needs its headers, and a machine without it loses nothing else.
#pragma once

#include <memory>

#include "quaver/dtype.h"

namespace quaver::comm {

struct UniqueId {
  char bytes[128];
};

// Rank 0 makes the id by which the ranks find each other, and shares it through any store.
UniqueId make_unique_id(const char* library = nullptr);

// Version code of NCCL's library, such as 22809 for 2.28.9. Throws where there is none.
int nccl_version(const char* library = nullptr);

enum class Reduction { sum, max };

// Ranks of one device each. Every function that moves data is collective, queues its work in
// `stream` and returns before the work is done. An error aborts the communicator, and every later
// use of it throws; so does a peer that does not answer for `timeout` seconds while connecting.
// `abort` may be called from any thread and frees the kernels that wait for a peer that is gone.
class Communicator {
 public:
  // `library` is a path or name for dlopen; null looks for libnccl.so.2.
  Communicator(const UniqueId& id, int rank, int size, double timeout,
               const char* library = nullptr);
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }

  // The p-th part of send, send_bytes[p] long, goes to rank p; the p-th of recv comes from rank p.
  // Ranks between which all parts are empty need not call it together: so it also sends to one
  // rank.
  void all_to_all(const void* send, const int64_t* send_bytes, void* recv,
                  const int64_t* recv_bytes, void* stream);
  // recv is the `bytes` of every rank, in their order.
  void all_gather(const void* send, void* recv, int64_t bytes, void* stream);
  // `data` becomes that of rank `root`.
  void broadcast(void* data, int64_t bytes, int root, void* stream);
  // Reduces in place, in NCCL's own order and rounding; FP8 rounds at every hop and needs
  // NCCL 2.24.
  void all_reduce(void* values, int64_t count, DType type, Reduction reduction, void* stream);

  bool sums_fp8() const;

  // Throws if an operation has failed since, on whatever rank.
  void check();
  void abort();

 private:
  struct State;
  template <class Call>
  void run(const char* op, Call call);
  void finish(const char* op);

  std::unique_ptr<State> state_;
  int rank_, size_;
  double timeout_;
};

}  // namespace quaver::comm
