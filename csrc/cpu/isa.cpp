// Chooses the vector loops at run time and holds the thread hook.
#include <cstring>

#include "parallel.h"
#include "quaver/check.h"
#include "simd.h"
#include "simd_activation.h"
#include "simd_microadam.h"

namespace quaver::cpu {

namespace portable {
extern const Simd table;
extern const ActivationSimd activation_table;
extern const MicroAdamSimd micro_adam_table;
}  // namespace portable
#if defined(QUAVER_HAVE_X86_ISA)
namespace avx2 {
extern const Simd table;
extern const ActivationSimd activation_table;
extern const MicroAdamSimd micro_adam_table;
}  // namespace avx2
namespace avx512 {
extern const Simd table;
extern const ActivationSimd activation_table;
extern const MicroAdamSimd micro_adam_table;
}  // namespace avx512
#endif

namespace {

struct Isas {
  const char* names[3];
  const Simd* tables[3];
  const ActivationSimd* activation_tables[3];
  const MicroAdamSimd* micro_adam_tables[3];
  int count = 0;
  std::atomic<int> current{0};

  Isas() {
#if defined(QUAVER_HAVE_X86_ISA)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      push("avx512", &avx512::table, &avx512::activation_table, &avx512::micro_adam_table);
    if (has_avx2) push("avx2", &avx2::table, &avx2::activation_table, &avx2::micro_adam_table);
#endif
    push("portable", &portable::table, &portable::activation_table, &portable::micro_adam_table);
  }
  void push(const char* name, const Simd* table, const ActivationSimd* activation_table,
            const MicroAdamSimd* micro_adam_table) {
    names[count] = name;
    micro_adam_tables[count] = micro_adam_table;
    activation_tables[count] = activation_table;
    tables[count++] = table;
  }
};

Isas& isas() {
  static Isas instance;
  return instance;
}

void run_serially(int64_t n, int64_t, void* context, ParallelBody body) { body(context, 0, n); }

std::atomic<ParallelFor> parallel_hook{run_serially};

}  // namespace

const Simd& simd() { return *isas().tables[isas().current.load(std::memory_order_relaxed)]; }

const ActivationSimd& activation_simd() {
  return *isas().activation_tables[isas().current.load(std::memory_order_relaxed)];
}

const MicroAdamSimd& micro_adam_simd() {
  return *isas().micro_adam_tables[isas().current.load(std::memory_order_relaxed)];
}

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
