// Kernels that are right: their results are the same in every order.
#include <type_traits>

#include "examples.h"

namespace {

// out[thread of the grid]: its block's sum.
__global__ void block_sums_kernel(const float* x, float* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = block_sum<true, true>(x[i]);
}

// The last block to finish adds up what the blocks have left in the slots.
__global__ void __launch_bounds__(1024) grid_sum_kernel(const float* x, float* slots, unsigned* ticket, float* out) {
  const float sum = block_sum<true, true>(x[blockIdx.x * blockDim.x + threadIdx.x]);
  bool last = false;
  if (threadIdx.x == 0) {
    slots[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  if (!__syncthreads_or(last)) return;
  float mine = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) mine += __ldcg(slots + b);
  const float total = block_sum<true, true>(mine);
  if (threadIdx.x == 0) {
    *out = total;
    *ticket = 0;
  }
}

// out[4][threads]: the lane that each kind of shuffle read.
__global__ void shuffles_kernel(int amount, int width, int* out) {
  const int lane = threadIdx.x % warpSize;
  const unsigned n = blockDim.x;
  out[0 * n + threadIdx.x] = __shfl_sync(0xffffffff, lane, amount, width);
  out[1 * n + threadIdx.x] = __shfl_up_sync(0xffffffff, lane, amount, width);
  out[2 * n + threadIdx.x] = __shfl_down_sync(0xffffffff, lane, amount, width);
  out[3 * n + threadIdx.x] = __shfl_xor_sync(0xffffffff, lane, amount, width);
}

// Neighbours' values of every type that can be shuffled.
template <class T>
__global__ void exchange_kernel(const T* x, T* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xffffffff, x[threadIdx.x], 1);
}

// out[6][threads]: over the block, then over the warp, of threads whose x is not zero.
__global__ void votes_kernel(const int* x, unsigned* out) {
  const unsigned n = blockDim.x, i = threadIdx.x;
  out[0 * n + i] = __syncthreads_count(x[i]);
  out[1 * n + i] = __syncthreads_or(x[i]);
  out[2 * n + i] = __syncthreads_and(x[i]);
  out[3 * n + i] = __ballot_sync(0xffffffff, x[i]);
  out[4 * n + i] = __any_sync(0xffffffff, x[i]);
  out[5 * n + i] = __all_sync(0xffffffff, x[i]);
}

// The upper half of a warp meets alone before it meets the lower half; the last warp has 16 threads.
__global__ void halves_kernel(int* out) {
  const unsigned lane = threadIdx.x % warpSize;
  const unsigned all = threadIdx.x / warpSize == blockDim.x / warpSize ? 0xffff : 0xffffffff;
  int value = lane;
  if (lane >= 16) value += __shfl_xor_sync(0xffff0000, value, 15);
  __syncwarp(all);
  out[threadIdx.x] = __shfl_sync(all, value, all == 0xffff ? 5 : 20);
}

// Where each thread is in the grid.
__global__ void places_kernel(uint3* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  uint3* mine = out + 2 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
  mine[0] = blockIdx;
  mine[1] = threadIdx;
}

// out[2][threads of the grid]: when each came, before and after a barrier. The order itself: the one kernel here that shows it.
__global__ void arrivals_kernel(unsigned* counters, unsigned* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = atomicAdd(counters, 1u);
  __syncthreads();
  out[gridDim.x * blockDim.x + i] = atomicAdd(counters + 1, 1u);
}

// As many bytes as a kernel can be given.
struct Table {
  int64_t values[4094];
};
__global__ void by_value_kernel(const __grid_constant__ Table table, int64_t* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < sizeof table.values / sizeof *table.values) out[i] = table.values[i];
}

// 16 bytes at a time.
struct alignas(16) Pack {
  float values[4];
};
__global__ void packs_kernel(const float* x, float* out) {
  const unsigned i = threadIdx.x;
  reinterpret_cast<Pack*>(out)[i] = reinterpret_cast<const Pack*>(x)[i];
  const float4 four = __ldcs(reinterpret_cast<const float4*>(x) + blockDim.x + i);
  __stcs(reinterpret_cast<float4*>(out) + blockDim.x + i, four);
}

}  // namespace

EXPORT bool block_sums(int blocks, int threads, const float* x, float* out) {
  return run(block_sums_kernel, blocks, threads, x, out);
}
EXPORT bool grid_sum(int blocks, int threads, const float* x, float* slots, unsigned* ticket, float* out) {
  return run(grid_sum_kernel, blocks, threads, x, slots, ticket, out);
}
EXPORT bool shuffles(int threads, int amount, int width, int* out) {
  return run(shuffles_kernel, 1, threads, amount, width, out);
}
EXPORT bool exchange_float(const float* x, float* out) { return run(exchange_kernel<float>, 1, 32, x, out); }
EXPORT bool exchange_double(const double* x, double* out) { return run(exchange_kernel<double>, 1, 32, x, out); }
EXPORT bool exchange_int(const int* x, int* out) { return run(exchange_kernel<int>, 1, 32, x, out); }
EXPORT bool exchange_unsigned(const unsigned* x, unsigned* out) { return run(exchange_kernel<unsigned>, 1, 32, x, out); }
EXPORT bool exchange_int64(const int64_t* x, int64_t* out) { return run(exchange_kernel<int64_t>, 1, 32, x, out); }
EXPORT bool exchange_uint64(const uint64_t* x, uint64_t* out) { return run(exchange_kernel<uint64_t>, 1, 32, x, out); }
EXPORT bool votes(int threads, const int* x, unsigned* out) { return run(votes_kernel, 1, threads, x, out); }
EXPORT bool halves(int threads, int* out) { return run(halves_kernel, 1, threads, out); }
EXPORT bool places(const unsigned* grid, const unsigned* block, void* out) {
  return run(places_kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), static_cast<uint3*>(out));
}
EXPORT bool arrivals(int blocks, int threads, unsigned* counters, unsigned* out) {
  return run(arrivals_kernel, blocks, threads, counters, out);
}
EXPORT bool by_value(const Table* table, int64_t* out) { return run(by_value_kernel, 64, 64, *table, out); }
EXPORT bool packs(int threads, const float* x, float* out) { return run(packs_kernel, 1, threads, x, out); }

// CUDA's last error after a launch, with and without clearing it.
EXPORT int peek_at_last_error() { return cudaPeekAtLastError(); }
EXPORT int get_last_error() { return cudaGetLastError(); }
EXPORT const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

#if defined(SAM_FUSED_EMULATED)
EXPORT unsigned threads_per_block(unsigned wanted) { return sam_emulation::threads_per_block(wanted); }
#endif
