// What a warp does with tiles of FP8 codes: it copies them to shared memory beside its other work,
// loads them as fragments of registers and multiplies those by mma.sync. (PTX ISA, cp.async,
// ldmatrix and mma.m16n8k32, which takes FP8 from sm_89 on.)
#pragma once

#include "launch.h"
#include "quaver/dtype.h"

#if !defined(__CUDACC__)
#include "matrix.h"
#endif

namespace quaver::cuda {

constexpr int kCopyBytes = 16;

#if defined(__CUDACC__)
QUAVER_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// Starts a copy of 16 bytes to shared memory; zeros arrive where `there` is false.
QUAVER_DEVICE void copy_async(void* to, const void* from, bool there) {
#if defined(__CUDACC__)
  const int bytes = there ? kCopyBytes : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
#else
  simt::copy_async(to, from, kCopyBytes, there);
#endif
}

// Ends a group of the thread's copies.
QUAVER_DEVICE void commit_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::commit_copies();
#endif
}

// Waits for all of the thread's groups but the `kPending` latest.
template <int kPending>
QUAVER_DEVICE void wait_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  simt::wait_copies(kPending);
#endif
}

// Four tiles of 8 rows of 16 bytes. Lane 8 t + r names row r of tile t, and gets of each tile bytes
// 4 (lane % 4).. of row lane / 4.
QUAVER_DEVICE void load_tiles(uint32_t (&to)[4], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
#else
  simt::load_tiles(to, row);
#endif
}

// sums += a @ b.T of 16 x 32 codes and 8 x 32. Lane 4 g + c holds of `a` rows g and g + 8, in pairs
// of the first 16 columns and of the others, of `b` row g, and of the sums columns 2 c and 2 c + 1
// of rows g and g + 8.
#if defined(__CUDACC__)
#define QUAVER_MULTIPLY(A, B)                                                                    \
  QUAVER_DEVICE void multiply_tiles(A, B, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, \
                                    uint32_t b1) {                                               \
    asm("mma.sync.aligned.m16n8k32.row.col.f32." #A "." #B                                       \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                   \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                         \
  }
QUAVER_MULTIPLY(e4m3, e4m3)
QUAVER_MULTIPLY(e5m2, e4m3)
QUAVER_MULTIPLY(e4m3, e5m2)
#undef QUAVER_MULTIPLY
#else
template <class A, class B>
QUAVER_DEVICE void multiply_tiles(A, B, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                  uint32_t b1) {
  simt::multiply_tiles<A, B>(sums, a, b0, b1);
}
#endif

}  // namespace quaver::cuda
