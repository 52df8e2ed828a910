// Chooses the vector loops at run time and holds the thread hook.
#include <cstring>

#include "parallel.h"
#include "quaver/check.h"
#include "simd.h"
#include "simd_activation.h"
#include "simd_adam4.h"
#include "simd_cast.h"
#include "simd_microadam.h"
#include "simd_nf4.h"
#include "simd_product.h"
#include "simd_rotate.h"

namespace quaver::cpu {

namespace portable {
extern const Simd table;
extern const ActivationSimd activation_table;
extern const MicroAdamSimd micro_adam_table;
extern const Nf4Simd nf4_table;
extern const Adam4Simd adam4_table;
extern const CastSimd cast_table;
extern const RotateSimd rotate_table;
}  // namespace portable
#if defined(QUAVER_HAVE_X86_ISA)
namespace avx2 {
extern const ProductSimd product_table;
extern const Simd table;
extern const ActivationSimd activation_table;
extern const MicroAdamSimd micro_adam_table;
extern const Nf4Simd nf4_table;
extern const Adam4Simd adam4_table;
extern const CastSimd cast_table;
extern const RotateSimd rotate_table;
}  // namespace avx2
namespace avx512_bf16 {
extern const ProductSimd product_table;
}
namespace avx512 {
extern const ProductSimd product_table;
extern const Simd table;
extern const ActivationSimd activation_table;
extern const MicroAdamSimd micro_adam_table;
extern const Nf4Simd nf4_table;
extern const Adam4Simd adam4_table;
extern const CastSimd cast_table;
extern const RotateSimd rotate_table;
}  // namespace avx512
#endif

namespace {

// One instruction set's loops.
struct Tables {
  const char* name;
  const Simd* simd;
  const ActivationSimd* activation;
  const MicroAdamSimd* micro_adam;
  const Nf4Simd* nf4;
  const Adam4Simd* adam4;
  const CastSimd* cast;
  const RotateSimd* rotate;
  const ProductSimd* product;
};

#define QUAVER_TABLES(isa, product) \
  {#isa,                            \
   &isa::table,                     \
   &isa::activation_table,          \
   &isa::micro_adam_table,          \
   &isa::nf4_table,                 \
   &isa::adam4_table,               \
   &isa::cast_table,                \
   &isa::rotate_table,              \
   product}

#if defined(QUAVER_HAVE_X86_ISA)
const ProductSimd* products_of_avx512() {
  if (__builtin_cpu_supports("amx-bf16")) return nullptr;  // torch's products use it
  const bool has_bf16 =
      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  return has_bf16 ? &avx512_bf16::product_table : &avx512::product_table;
}
#endif

struct Isas {
  Tables tables[3];
  const char* names[3];
  int count = 0;
  std::atomic<int> current{0};

  // The constructor stays out of line: simd() and others look here for every few hundred values,
  // and each look would save the registers that only the first one needs.
  __attribute__((noinline)) Isas() {
#if defined(QUAVER_HAVE_X86_ISA)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      push(QUAVER_TABLES(avx512, products_of_avx512()));
    if (has_avx2) push(QUAVER_TABLES(avx2, &avx2::product_table));
#endif
    push(QUAVER_TABLES(portable, nullptr));
  }
  void push(const Tables& all) {
    names[count] = all.name;
    tables[count++] = all;
  }
};

Isas& isas() {
  static Isas instance;
  return instance;
}

void run_serially(int64_t n, int64_t, void* context, ParallelBody body) { body(context, 0, n); }

std::atomic<ParallelFor> parallel_hook{run_serially};

const Tables& current_tables() {
  return isas().tables[isas().current.load(std::memory_order_relaxed)];
}

}  // namespace

const Simd& simd() { return *current_tables().simd; }
const ActivationSimd& activation_simd() { return *current_tables().activation; }
const MicroAdamSimd& micro_adam_simd() { return *current_tables().micro_adam; }
const Nf4Simd& nf4_simd() { return *current_tables().nf4; }
const Adam4Simd& adam4_simd() { return *current_tables().adam4; }
const CastSimd& cast_simd() { return *current_tables().cast; }
const ProductSimd* product_simd() { return current_tables().product; }
const RotateSimd& rotate_simd() { return *current_tables().rotate; }

const char* const* available_isas(int* count) {
  *count = isas().count;
  return isas().names;
}

const char* isa() { return isas().names[isas().current.load()]; }

void set_isa(const char* name) {
  for (int i = 0; i < isas().count; ++i) {
    if (std::strcmp(name, isas().names[i]) != 0) continue;
    isas().current.store(i);
    return;
  }
  std::string have;
  for (int i = 0; i < isas().count; ++i) have += std::string(i ? ", " : "") + isas().names[i];
  fail("set_isa: this machine and build have ", have, "; got ", name);
}

void set_parallel_for(ParallelFor parallel_for) { parallel_hook.store(parallel_for); }
ParallelFor current_parallel_for() { return parallel_hook.load(); }

}  // namespace quaver::cpu
