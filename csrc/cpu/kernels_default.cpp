// The kernels for whatever this compiler targets by default, and the choice between the compilations.
#include "cpu/compilation.h"

#define SAM_FUSED_ISA_NAME "default"
namespace sam_fused::cpu {
namespace plain {
#include "cpu/kernels.inl"
}  // namespace plain

const Kernels* default_kernels() { return &plain::kTable; }

namespace {

bool runs_here(const Kernels* candidate) {
  if (candidate == nullptr) return false;
#if SAM_FUSED_MULTIVERSION
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (candidate == avx512_kernels()) return avx512;
  if (candidate == avx2_kernels()) return avx2;
#endif
  return true;
}

const Kernels& choose() {
  const char* wanted = std::getenv("SAM_FUSED_CPU_CAPABILITY");
  for (const Kernels* candidate : {avx512_kernels(), avx2_kernels(), default_kernels()}) {
    if (!runs_here(candidate)) continue;
    if (wanted == nullptr || std::strcmp(wanted, candidate->name) == 0) return *candidate;
  }
  return *default_kernels();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace sam_fused::cpu
