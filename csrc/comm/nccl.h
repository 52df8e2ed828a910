// The part of NCCL's C interface that we call, whose binary form has been the same since 2.14, and
// the library itself, opened at run time.
#pragma once

#include <cstddef>

namespace quaver::comm {

struct NcclComm;

enum NcclResult : int { kNcclSuccess = 0, kNcclInProgress = 7 };
enum NcclType : int {
  kNcclUint8 = 1,
  kNcclFloat16 = 6,
  kNcclFloat32 = 7,
  kNcclBfloat16 = 9,
  kNcclE4m3 = 10,
  kNcclE5m2 = 11
};
enum NcclOp : int { kNcclSum = 0, kNcclMax = 2 };

struct NcclId {
  char internal[128];
};

// The first fields of ncclConfig_t. NCCL reads `size` bytes and takes its defaults for fields that
// are younger than `version`.
struct NcclConfig {
  size_t size = sizeof(NcclConfig);
  unsigned magic = 0xcafebeefu;
  unsigned version = 21400;
  int blocking = 0;  // every call returns at once, so that a peer that is gone cannot hold us
};

constexpr int kNcclFirst = 21400;  // the first version with non-blocking communicators
constexpr int kNcclFp8 = 22400;    // the first that sums FP8

struct Nccl {
  int version;
  int (*GetVersion)(int*);
  int (*GetUniqueId)(NcclId*);
  int (*CommInitRankConfig)(NcclComm**, int, NcclId, int, NcclConfig*);
  int (*CommGetAsyncError)(NcclComm*, int*);
  int (*CommDestroy)(NcclComm*);
  int (*CommAbort)(NcclComm*);
  int (*GroupStart)();
  int (*GroupEnd)();
  int (*Send)(const void*, size_t, int, int, NcclComm*, void*);
  int (*Recv)(void*, size_t, int, int, NcclComm*, void*);
  int (*AllGather)(const void*, void*, size_t, int, NcclComm*, void*);
  int (*Broadcast)(const void*, void*, size_t, int, int, NcclComm*, void*);
  int (*AllReduce)(const void*, void*, size_t, int, int, NcclComm*, void*);
  const char* (*GetErrorString)(int);
  const char* (*GetLastError)(NcclComm*);
};

// Opened once per name and never closed. Throws if it is not there, lacks a function or is older
// than 2.14.
const Nccl& nccl(const char* library);

}  // namespace quaver::comm
