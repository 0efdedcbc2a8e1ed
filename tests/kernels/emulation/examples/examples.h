// What the emulation's own test kernels share. They are genuine CUDA: nvcc compiles the same sources.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

// The block's object of type T in shared memory.
template <class T>
__device__ T& shared() {
#if defined(SAM_FUSED_EMULATED)
  return sam_emulation::shared<T>();
#else
  __shared__ T memory;
  return memory;
#endif
}

// False where the launch failed; sam_emulation_message() says why.
template <class... Parameters, class... Arguments>
bool run(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments... arguments) {
#if defined(SAM_FUSED_EMULATED)
  return sam_emulation::caught([&] { sam_emulation::launch(kernel, grid, block, arguments...); });
#else
  kernel<<<grid, block>>>(arguments...);
  return cudaDeviceSynchronize() == cudaSuccess;
#endif
}

struct Totals {
  float value[32];
};

// The lanes' sum, in lane 0.
template <class T>
__device__ T warp_sum(T value) {
  for (int offset = warpSize / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffff, value, offset);
  return value;
}

// The block's sum, in every thread. Faulty without the barriers: the first lets an earlier sum's readers finish, the second
// lets the warps' totals arrive.
template <bool kBefore, bool kAfter>
__device__ float block_sum(float value) {
  Totals& totals = shared<Totals>();
  value = warp_sum(value);
  if constexpr (kBefore) __syncthreads();
  if (threadIdx.x % warpSize == 0) totals.value[threadIdx.x / warpSize] = value;
  if constexpr (kAfter) __syncthreads();
  float sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / warpSize; ++warp) sum += totals.value[warp];
  return sum;
}
