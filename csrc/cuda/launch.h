// The one place that starts kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/device.h"
#include "cuda/run.h"

namespace sam_fused::cuda {

template <class Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks, Stream stream, const Arguments& arguments) {
  static_assert(sizeof(Arguments) <= kArgumentBytes, "a kernel's arguments must fit into CUDA's 32 KB");
  const auto grid = static_cast<unsigned>(blocks);
#if defined(SAM_FUSED_EMULATED)
  (void)stream;
  sam_emulation::launch(kernel, dim3(grid), dim3(sam_emulation::threads_per_block(kThreads)), arguments);
  const cudaError_t error = cudaGetLastError();
#else
  // Not kernel<<<...>>> and cudaGetLastError(): that one also reports what somebody else has left there, after our kernel has
  // started, and a caller told so would take the weights for unmoved.
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  const cudaError_t error = cudaLaunchKernel(kernel, dim3(grid), dim3(kThreads), pointers, 0, stream);
#endif
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("sam_fused: expected a kernel to start, but the CUDA runtime says: ") +
                             cudaGetErrorString(error) +
                             "; an earlier error on this device may be the cause, and CUDA_LAUNCH_BLOCKING=1 shows where");
  }
}

}  // namespace sam_fused::cuda
