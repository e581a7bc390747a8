// Choice of the instruction set at run time, by asking the processor.
#include "isa.h"

#include <atomic>

namespace orthofast {
namespace {

std::vector<const KernelTable*> find_levels() {
  std::vector<const KernelTable*> levels{kernels_portable()};
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
#ifdef ORTHOFAST_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) levels.push_back(kernels_avx2());
#endif
#ifdef ORTHOFAST_HAS_AVX512
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) levels.push_back(kernels_avx512());
#ifdef ORTHOFAST_HAS_AVX512BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) levels.push_back(kernels_avx512bf16());
#endif
#endif
#endif
  return levels;
}

std::atomic<const KernelTable*>& in_force() {
  static std::atomic<const KernelTable*> table{isa_levels().back()};
  return table;
}

}  // namespace

const std::vector<const KernelTable*>& isa_levels() {
  static const std::vector<const KernelTable*> levels = find_levels();
  return levels;
}

const KernelTable& kernels_in_force() { return *in_force().load(std::memory_order_relaxed); }

bool force_isa(const std::string& name) {
  for (const KernelTable* table : isa_levels()) {
    if (name == table->name) {
      in_force().store(table, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace orthofast
