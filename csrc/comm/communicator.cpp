#include <chrono>
#include <cstring>
#include <mutex>
#include <thread>

#include "nccl.h"
#include "quaver/check.h"
#include "quaver/comm.h"

namespace quaver::comm {
namespace {

using Clock = std::chrono::steady_clock;

// NCCL hands a message to a thread of its own, which takes it in within tens of microseconds. Only
// connections, and peers that are late, take longer: for those the waiting thread may sleep.
constexpr auto kYield = std::chrono::microseconds(200);
constexpr auto kSleep = std::chrono::milliseconds(1);

NcclType type_of(DType type) {
  switch (type) {
    case DType::f32: return kNcclFloat32;
    case DType::f16: return kNcclFloat16;
    case DType::bf16: return kNcclBfloat16;
    case DType::e4m3: return kNcclE4m3;
    case DType::e5m2: return kNcclE5m2;
  }
  fail("all_reduce: NCCL has no type for ", name_of(type));
}

}  // namespace

// The mutex serialises calls to NCCL, so that an abort from another thread never frees the
// communicator during one. No call blocks, so it is never held for long.
struct Communicator::State {
  const Nccl& api;
  NcclComm* comm = nullptr;  // null once aborted
  std::mutex mutex;

  explicit State(const Nccl& nccl) : api(nccl) {}

  // The caller holds the mutex.
  void abort() {
    if (comm != nullptr) api.CommAbort(comm);
    comm = nullptr;
  }
};

int nccl_version(const char* library) { return nccl(library).version; }

UniqueId make_unique_id(const char* library) {
  const Nccl& api = nccl(library);
  NcclId id = {};
  const int result = api.GetUniqueId(&id);
  QUAVER_CHECK(result == kNcclSuccess, "comm: NCCL makes no id: ", api.GetErrorString(result));
  UniqueId out = {};
  static_assert(sizeof(out.bytes) == sizeof(id.internal), "NCCL's ids have 128 bytes");
  std::memcpy(out.bytes, id.internal, sizeof(out.bytes));
  return out;
}

Communicator::Communicator(const UniqueId& id, int rank, int size, double timeout,
                           const char* library)
    : rank_(rank), size_(size), timeout_(timeout) {
  QUAVER_CHECK(size > 0 && rank >= 0 && rank < size, "comm: wanted a rank in [0, size), got rank ",
               rank, " of ", size);
  QUAVER_CHECK(timeout > 0.0, "comm: timeout must be positive, got ", timeout, " s");
  state_ = std::make_unique<State>(nccl(library));
  NcclId nccl_id;
  std::memcpy(nccl_id.internal, id.bytes, sizeof(nccl_id.internal));
  NcclConfig config;
  const int result = state_->api.CommInitRankConfig(&state_->comm, size, nccl_id, rank, &config);
  if (result != kNcclSuccess && result != kNcclInProgress) {
    state_->abort();
    fail("comm: NCCL refused rank ", rank, " of ", size, ": ", state_->api.GetErrorString(result));
  }
  finish("comm");
}

Communicator::~Communicator() {
  if (state_ == nullptr || state_->comm == nullptr) return;
  if (state_->api.CommDestroy(state_->comm) == kNcclSuccess) return;
  state_->api.CommAbort(state_->comm);
}

// Waits until NCCL has accepted the queued messages and made their connections, not until they ran.
void Communicator::finish(const char* op) {
  const auto began = Clock::now();
  for (;;) {
    std::chrono::duration<double> waited;
    {
      const std::lock_guard<std::mutex> lock(state_->mutex);
      QUAVER_CHECK(state_->comm != nullptr, op, ": the communicator of rank ", rank_, " of ", size_,
                   " was aborted");
      int status = kNcclSuccess;
      const int result = state_->api.CommGetAsyncError(state_->comm, &status);
      if (result != kNcclSuccess) status = result;
      if (status == kNcclSuccess) return;
      if (status != kNcclInProgress) {
        const char* detail = state_->api.GetLastError(state_->comm);
        const std::string last = detail == nullptr ? "" : detail;
        state_->abort();
        fail(op, ": NCCL failed on rank ", rank_, " of ", size_, ": ",
             state_->api.GetErrorString(status), last.empty() ? "" : "; ", last);
      }
      waited = Clock::now() - began;
      if (waited.count() > timeout_) {
        state_->abort();
        fail(op, ": rank ", rank_, " of ", size_, " waited ", timeout_,
             " s for a peer that did not answer");
      }
    }
    if (waited < kYield)
      std::this_thread::yield();
    else
      std::this_thread::sleep_for(kSleep);
  }
}

template <class Call>
void Communicator::run(const char* op, Call call) {
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    QUAVER_CHECK(state_->comm != nullptr, op, ": the communicator of rank ", rank_, " of ", size_,
                 " was aborted");
    const int result = call(state_->api, state_->comm);
    if (result == kNcclSuccess) return;
    if (result != kNcclInProgress) {
      state_->abort();
      fail(op, ": NCCL refused on rank ", rank_, " of ", size_, ": ",
           state_->api.GetErrorString(result));
    }
  }
  finish(op);
}

void Communicator::all_to_all(const void* send, const int64_t* send_bytes, void* recv,
                              const int64_t* recv_bytes, void* stream) {
  bool any = false;
  for (int p = 0; p < size_; ++p) {
    QUAVER_CHECK(send_bytes[p] >= 0 && recv_bytes[p] >= 0,
                 "all_to_all: wanted numbers of bytes, got ", send_bytes[p], " to and ",
                 recv_bytes[p], " from rank ", p);
    any = any || send_bytes[p] > 0 || recv_bytes[p] > 0;
  }
  if (!any) return;
  run("all_to_all", [&](const Nccl& api, NcclComm* comm) {
    const auto* from = static_cast<const char*>(send);
    auto* to = static_cast<char*>(recv);
    int result = api.GroupStart();
    for (int p = 0; p < size_ && result == kNcclSuccess; ++p) {
      const auto out = static_cast<size_t>(send_bytes[p]), in = static_cast<size_t>(recv_bytes[p]);
      if (out > 0) result = api.Send(from, out, kNcclUint8, p, comm, stream);
      if (in > 0 && result == kNcclSuccess) result = api.Recv(to, in, kNcclUint8, p, comm, stream);
      from += out;
      to += in;
    }
    const int ended = api.GroupEnd();  // always, or the thread stays inside the group
    return result == kNcclSuccess ? ended : result;
  });
}

void Communicator::all_gather(const void* send, void* recv, int64_t bytes, void* stream) {
  QUAVER_CHECK(bytes >= 0, "all_gather: wanted a number of bytes, got ", bytes);
  if (bytes == 0) return;
  run("all_gather", [&](const Nccl& api, NcclComm* comm) {
    return api.AllGather(send, recv, static_cast<size_t>(bytes), kNcclUint8, comm, stream);
  });
}

void Communicator::broadcast(void* data, int64_t bytes, int root, void* stream) {
  QUAVER_CHECK(bytes >= 0, "broadcast: wanted a number of bytes, got ", bytes);
  QUAVER_CHECK(root >= 0 && root < size_, "broadcast: wanted a root in [0, ", size_, "), got ",
               root);
  if (bytes == 0) return;
  run("broadcast", [&](const Nccl& api, NcclComm* comm) {
    return api.Broadcast(data, data, static_cast<size_t>(bytes), kNcclUint8, root, comm, stream);
  });
}

void Communicator::all_reduce(void* values, int64_t count, DType type, Reduction reduction,
                              void* stream) {
  QUAVER_CHECK(count >= 0, "all_reduce: wanted a number of values, got ", count);
  QUAVER_CHECK(!is_fp8(type) || sums_fp8(), "all_reduce: ", name_of(type),
               " needs NCCL 2.24, this is ", state_->api.version);
  if (count == 0) return;
  run("all_reduce", [&](const Nccl& api, NcclComm* comm) {
    return api.AllReduce(values, values, static_cast<size_t>(count), type_of(type),
                         reduction == Reduction::sum ? kNcclSum : kNcclMax, comm, stream);
  });
}

bool Communicator::sums_fp8() const { return state_->api.version >= kNcclFp8; }

void Communicator::check() { finish("comm"); }

void Communicator::abort() {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  state_->abort();
}

}  // namespace quaver::comm
