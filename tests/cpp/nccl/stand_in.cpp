// The functions of NCCL that csrc/comm calls, for ranks that are threads or processes of one
// machine and memory of the host: what tests open where NCCL would be. As a non-blocking NCCL does,
// every call returns at once, and ncclCommGetAsyncError tells when its peers have come.
//
// A world is a directory in TMPDIR, a message a file in it. QUAVER_STAND_IN_DEAF=1 does not notice
// that a peer's process has ended, as NCCL does not over shared memory.
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "quaver/fp8.h"

namespace {

namespace fs = std::filesystem;

enum { kSuccess = 0, kSystemError = 2, kInvalidArgument = 4, kRemoteError = 6, kInProgress = 7 };
enum { kFloat32 = 7, kE4m3 = 10, kE5m2 = 11 };

std::atomic<int> reported_version = 22809;
std::atomic<int> failing_rank = -1;
std::atomic<int> delay = 0;  // microseconds in which NCCL's own thread takes a message in
std::atomic<int> polls = 0;

struct Id {
  char internal[128];
};

// Appears whole or not at all.
void write_file(const fs::path& path, const void* data, size_t bytes) {
  const fs::path part = path.string() + ".part";
  std::ofstream(part, std::ios::binary)
      .write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
  fs::rename(part, path);
}

std::string read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

// Receives that wait for their message, in the order in which they were asked for.
struct Comm {
  struct Receive {
    int from;
    std::function<void(const char*)> use;
  };

  fs::path world;
  int rank, size;
  std::mutex mutex;
  std::vector<int> processes;  // of the ranks, once all have joined
  std::map<int, int> sent, received;
  std::deque<Receive> waiting;
  std::chrono::steady_clock::time_point ready;

  Comm(fs::path path, int rank_, int size_) : world(std::move(path)), rank(rank_), size(size_) {
    const std::string process = std::to_string(getpid());
    write_file(world / ("joined-" + std::to_string(rank)), process.data(), process.size());
  }
  // The last to leave takes the world away.
  ~Comm() {
    write_file(world / ("left-" + std::to_string(rank)), "", 0);
    std::error_code gone;
    for (int p = 0; p < size; ++p)
      if (!fs::exists(world / ("left-" + std::to_string(p)), gone)) return;
    fs::remove_all(world, gone);
  }

  fs::path message(int from, int to, int number) const {
    return world / (std::to_string(from) + "-" + std::to_string(to) + "-" + std::to_string(number));
  }
  void send(int to, const void* data, size_t bytes) {
    write_file(message(rank, to, sent[to]++), data, bytes);
  }
  void receive(int from, std::function<void(const char*)> use) {
    waiting.push_back({from, std::move(use)});
    ready = std::chrono::steady_clock::now() + std::chrono::microseconds(delay);
  }
  bool all_joined() {
    if (!processes.empty()) return true;
    std::vector<int> found;
    for (int p = 0; p < size; ++p) {
      const std::string process = read_file(world / ("joined-" + std::to_string(p)));
      if (process.empty()) return false;
      found.push_back(std::stoi(process));
    }
    processes = found;
    return true;
  }
  bool alive(int p) const {
    return getenv("QUAVER_STAND_IN_DEAF") || kill(processes[p], 0) == 0 || errno != ESRCH;
  }
  int progress() {
    ++polls;
    if (rank == failing_rank) return kRemoteError;
    if (std::chrono::steady_clock::now() < ready) return kInProgress;
    if (!all_joined()) return kInProgress;
    while (!waiting.empty()) {
      const Receive next = waiting.front();
      const bool there = alive(next.from);  // before looking: what it sent last still counts
      const fs::path path = message(next.from, rank, received[next.from]);
      if (!fs::exists(path)) return there ? kInProgress : kRemoteError;
      next.use(read_file(path).data());
      fs::remove(path);
      ++received[next.from];
      waiting.pop_front();
    }
    return kSuccess;
  }
};

namespace {

// In rank order, rounded (and saturated) at every addition.
template <class T>
void reduce(Comm* comm, const void* send, void* recv, size_t count, bool sum) {
  auto* out = static_cast<T*>(recv);
  for (int p = 0; p < comm->size; ++p) {
    comm->send(p, send, count * sizeof(T));
    comm->receive(p, [=](const char* data) {
      for (size_t i = 0; i < count; ++i) {
        T value;
        std::memcpy(&value, data + i * sizeof(T), sizeof(T));
        const float x = quaver::decode(value), y = quaver::decode(out[i]);
        out[i] = p == 0 ? value : quaver::encode_nearest<T>(sum ? y + x : std::max(y, x));
      }
    });
  }
}

}  // namespace

extern "C" {

void stand_in_version(int version) { reported_version = version; }
void stand_in_fail(int rank) { failing_rank = rank; }
void stand_in_delay(int microseconds) { delay = microseconds; }
int stand_in_polls() { return polls.exchange(0); }

int ncclGetVersion(int* version) {
  const char* told = getenv("QUAVER_STAND_IN_VERSION");
  *version = told ? std::atoi(told) : reported_version.load();
  return kSuccess;
}

int ncclGetUniqueId(Id* id) {
  *id = {};
  const std::string path = (fs::temp_directory_path() / "nccl-XXXXXX").string();
  if (path.size() >= sizeof(id->internal)) return kSystemError;
  std::memcpy(id->internal, path.data(), path.size());
  return mkdtemp(id->internal) ? kSuccess : kSystemError;
}

int ncclCommInitRankConfig(Comm** comm, int size, Id id, int rank, void*) {
  if (id.internal[0] == 0) return kInvalidArgument;
  *comm = new Comm(id.internal, rank, size);
  return kInProgress;
}

int ncclCommGetAsyncError(Comm* comm, int* status) {
  const std::lock_guard<std::mutex> lock(comm->mutex);
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
  const std::lock_guard<std::mutex> lock(comm->mutex);
  comm->send(peer, data, count);
  return kSuccess;
}

int ncclRecv(void* data, size_t count, int, int peer, Comm* comm, void*) {
  const std::lock_guard<std::mutex> lock(comm->mutex);
  comm->receive(peer, [=](const char* from) { std::memcpy(data, from, count); });
  return kSuccess;
}

int ncclAllGather(const void* send, void* recv, size_t count, int, Comm* comm, void*) {
  const std::lock_guard<std::mutex> lock(comm->mutex);
  for (int p = 0; p < comm->size; ++p) {
    comm->send(p, send, count);
    char* to = static_cast<char*>(recv) + static_cast<size_t>(p) * count;
    comm->receive(p, [=](const char* from) { std::memcpy(to, from, count); });
  }
  return kInProgress;
}

int ncclBroadcast(const void* send, void* recv, size_t count, int, int root, Comm* comm, void*) {
  const std::lock_guard<std::mutex> lock(comm->mutex);
  for (int p = 0; p < comm->size && comm->rank == root; ++p) comm->send(p, send, count);
  comm->receive(root, [=](const char* from) { std::memcpy(recv, from, count); });
  return kInProgress;
}

int ncclAllReduce(const void* send, void* recv, size_t count, int type, int op, Comm* comm, void*) {
  const std::lock_guard<std::mutex> lock(comm->mutex);
  const bool sum = op == 0;
  switch (type) {
    case kFloat32: reduce<float>(comm, send, recv, count, sum); break;
    case kE4m3: reduce<quaver::e4m3>(comm, send, recv, count, sum); break;
    case kE5m2: reduce<quaver::e5m2>(comm, send, recv, count, sum); break;
    default: return kInvalidArgument;
  }
  return kInProgress;
}

const char* ncclGetErrorString(int result) {
  return result == kRemoteError   ? "remote process exited or there was a network error"
         : result == kSystemError ? "unhandled system error"
                                  : "invalid argument";
}
const char* ncclGetLastError(Comm*) { return "a peer closed its socket"; }
}
