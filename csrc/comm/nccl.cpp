#include "nccl.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <string>

#include "quaver/check.h"

namespace quaver::comm {
namespace {

template <class Function>
void find(void* handle, const std::string& library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  QUAVER_CHECK(function != nullptr, "comm: ", library, " has no ", name, "; NCCL 2.14 or newer is ",
               "needed");
}

Nccl open(const std::string& library) {
  // A torch with CUDA has loaded its NCCL already, and this finds that one.
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  QUAVER_CHECK(handle != nullptr, "comm: NCCL does not load: ", dlerror());
  Nccl api = {};
  find(handle, library, "ncclGetVersion", api.GetVersion);
  find(handle, library, "ncclGetUniqueId", api.GetUniqueId);
  find(handle, library, "ncclCommInitRankConfig", api.CommInitRankConfig);
  find(handle, library, "ncclCommGetAsyncError", api.CommGetAsyncError);
  find(handle, library, "ncclCommDestroy", api.CommDestroy);
  find(handle, library, "ncclCommAbort", api.CommAbort);
  find(handle, library, "ncclGroupStart", api.GroupStart);
  find(handle, library, "ncclGroupEnd", api.GroupEnd);
  find(handle, library, "ncclSend", api.Send);
  find(handle, library, "ncclRecv", api.Recv);
  find(handle, library, "ncclAllGather", api.AllGather);
  find(handle, library, "ncclBroadcast", api.Broadcast);
  find(handle, library, "ncclAllReduce", api.AllReduce);
  find(handle, library, "ncclGetErrorString", api.GetErrorString);
  find(handle, library, "ncclGetLastError", api.GetLastError);
  QUAVER_CHECK(api.GetVersion(&api.version) == kNcclSuccess && api.version >= kNcclFirst,
               "comm: ", library, " is NCCL ", api.version, "; wanted ", kNcclFirst,
               " (2.14.0) or newer");
  return api;
}

}  // namespace

const Nccl& nccl(const char* library) {
  static std::mutex mutex;
  // Never destroyed: communicators may outlive every other static of the process.
  static auto& opened = *new std::map<std::string, Nccl>;
  const std::string name = library != nullptr && *library ? library : "libnccl.so.2";
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = opened.find(name);
  return known != opened.end() ? known->second : opened.emplace(name, open(name)).first->second;
}

}  // namespace quaver::comm
