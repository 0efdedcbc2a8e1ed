// The kernels compiled for AVX-512 (F, BW, VL, DQ), FMA and F16C. Chosen at run time, so the library itself runs on any x86-64.
#include "cpu/compilation.h"

#if SAM_FUSED_MULTIVERSION
#define SAM_FUSED_ISA_NAME "avx512"
SAM_FUSED_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
namespace sam_fused::cpu {
namespace avx512 {
#include "cpu/kernels.inl"
}  // namespace avx512
}  // namespace sam_fused::cpu
SAM_FUSED_END_TARGET
#endif

namespace sam_fused::cpu {
#if SAM_FUSED_MULTIVERSION
const Kernels* avx512_kernels() { return &avx512::kTable; }
#else
const Kernels* avx512_kernels() { return nullptr; }
#endif
}  // namespace sam_fused::cpu
