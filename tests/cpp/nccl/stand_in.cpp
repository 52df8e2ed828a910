// The functions of NCCL that csrc/comm calls, for ranks that are threads of one process and memory
// of the host: what test_comm.cpp opens where NCCL would be. As a non-blocking NCCL does, every
// call returns at once, and ncclCommGetAsyncError tells when its peers have come.
#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace {

enum { kSuccess = 0, kInvalidArgument = 4, kRemoteError = 6, kInProgress = 7 };

using Bytes = std::vector<char>;

// What the ranks of one id share.
struct World {
  int joined = 0;
  std::map<std::pair<int, int>, std::deque<Bytes>> mail;  // by sender and receiver
};

std::mutex mutex;
std::map<std::string, std::shared_ptr<World>> worlds;
int last_id = 0;
int reported_version = 22809;
int failing_rank = -1;

struct Id {
  char internal[128];
};

}  // namespace

// Receives that wait for their message, in the order in which they were asked for.
struct Comm {
  std::shared_ptr<World> world;
  int rank, size;
  std::deque<std::pair<int, std::function<void(const Bytes&)>>> waiting;

  void send(int to, const void* data, size_t bytes) {
    const char* from = static_cast<const char*>(data);
    world->mail[{rank, to}].emplace_back(from, from + bytes);
  }
  void receive(int from, std::function<void(const Bytes&)> use) {
    waiting.emplace_back(from, std::move(use));
  }
  int progress() {
    if (rank == failing_rank) return kRemoteError;
    if (world->joined < size) return kInProgress;
    while (!waiting.empty()) {
      auto& box = world->mail[{waiting.front().first, rank}];
      if (box.empty()) return kInProgress;
      waiting.front().second(box.front());
      box.pop_front();
      waiting.pop_front();
    }
    return kSuccess;
  }
};

extern "C" {

void stand_in_version(int version) { reported_version = version; }
void stand_in_fail(int rank) { failing_rank = rank; }

int ncclGetVersion(int* version) {
  *version = reported_version;
  return kSuccess;
}

int ncclGetUniqueId(Id* id) {
  const std::lock_guard<std::mutex> lock(mutex);
  *id = {};
  std::snprintf(id->internal, sizeof(id->internal), "world %d", ++last_id);
  return kSuccess;
}

int ncclCommInitRankConfig(Comm** comm, int size, Id id, int rank, void*) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (id.internal[0] == 0) return kInvalidArgument;
  auto& world = worlds[id.internal];
  if (world == nullptr) world = std::make_shared<World>();
  ++world->joined;
  *comm = new Comm{world, rank, size, {}};
  return kInProgress;
}

int ncclCommGetAsyncError(Comm* comm, int* status) {
  const std::lock_guard<std::mutex> lock(mutex);
  *status = comm->progress();
  return kSuccess;
}

int ncclCommDestroy(Comm* comm) {
  delete comm;
  return kSuccess;
}
int ncclCommAbort(Comm* comm) { return ncclCommDestroy(comm); }

int ncclGroupStart() { return kSuccess; }
int ncclGroupEnd() { return kInProgress; }

int ncclSend(const void* data, size_t count, int, int peer, Comm* comm, void*) {
  const std::lock_guard<std::mutex> lock(mutex);
  comm->send(peer, data, count);
  return kSuccess;
}

int ncclRecv(void* data, size_t, int, int peer, Comm* comm, void*) {
  const std::lock_guard<std::mutex> lock(mutex);
  comm->receive(peer, [data](const Bytes& b) { std::memcpy(data, b.data(), b.size()); });
  return kSuccess;
}

int ncclAllGather(const void* send, void* recv, size_t count, int, Comm* comm, void*) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (int p = 0; p < comm->size; ++p) {
    comm->send(p, send, count);
    char* to = static_cast<char*>(recv) + static_cast<size_t>(p) * count;
    comm->receive(p, [to](const Bytes& b) { std::memcpy(to, b.data(), b.size()); });
  }
  return kInProgress;
}

// f32 only; in rank order.
int ncclAllReduce(const void* send, void* recv, size_t count, int type, int op, Comm* comm, void*) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (type != 7) return kInvalidArgument;
  auto* out = static_cast<float*>(recv);
  for (int p = 0; p < comm->size; ++p) {
    comm->send(p, send, count * sizeof(float));
    comm->receive(p, [=](const Bytes& b) {
      for (size_t i = 0; i < count; ++i) {
        float x;
        std::memcpy(&x, b.data() + i * sizeof(float), sizeof(x));
        out[i] = p == 0 ? x : op == 0 ? out[i] + x : std::max(out[i], x);
      }
    });
  }
  return kInProgress;
}

const char* ncclGetErrorString(int result) {
  return result == kRemoteError ? "remote process exited or there was a network error"
                                : "invalid argument";
}
const char* ncclGetLastError(Comm*) { return "a peer closed its socket"; }
}
