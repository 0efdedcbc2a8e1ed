// The kernels compiled for AVX2, FMA and F16C. Chosen at run time, so the library itself runs on any x86-64.
#include "cpu/compilation.h"

#if SAM_FUSED_MULTIVERSION
#define SAM_FUSED_ISA_NAME "avx2"
SAM_FUSED_BEGIN_TARGET("avx2,fma,f16c")
namespace sam_fused::cpu {
namespace avx2 {
#include "cpu/kernels.inl"
}  // namespace avx2
}  // namespace sam_fused::cpu
SAM_FUSED_END_TARGET
#endif

namespace sam_fused::cpu {
#if SAM_FUSED_MULTIVERSION
const Kernels* avx2_kernels() { return &avx2::kTable; }
#else
const Kernels* avx2_kernels() { return nullptr; }
#endif
}  // namespace sam_fused::cpu
