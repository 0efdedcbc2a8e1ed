// The one place that starts kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/device.h"
#include "cuda/run.h"

namespace sam_fused::cuda {

inline void check_started() {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("sam_fused: expected a kernel to start, but the CUDA runtime says: ") +
                             cudaGetErrorString(error) + "; an earlier error on this device may be the cause, and "
                             "CUDA_LAUNCH_BLOCKING=1 shows where");
  }
}

template <class Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks, Stream stream, const Arguments& arguments) {
  static_assert(sizeof(Arguments) <= kArgumentBytes, "a kernel's arguments must fit into CUDA's 32 KB");
#if defined(SAM_FUSED_EMULATED)
  (void)stream;
  sam_emulation::launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(sam_emulation::threads_per_block(kThreads)), arguments);
#else
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(arguments);
#endif
  check_started();
}

}  // namespace sam_fused::cuda
