// What every kernel does as a block: find its chunk, read its arguments, share memory, add up, know that it is the last one.
//
// tests/kernels runs these sources on a CPU too (SAM_FUSED_EMULATED), with a <cuda_runtime.h> of its own that turns the threads
// of a block into fibers; the macro touches shared memory here, starting kernels in launch.h and asking torch for its stream in
// ops.cpp, nothing else.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/arguments.h"
#include "squares.h"

namespace sam_fused::cuda {

// What the kernels are compiled for: so many blocks on a multiprocessor at once, which leaves each thread 64, 80 or 128
// registers. Without spills that is 32 to 64 KB of loads in flight, above the bandwidth times latency of an H200's share (about
// 25 KB).
inline constexpr int kThreads = 256;
inline constexpr int kNormBlocks = 3, kAscentBlocks = 4, kSgdBlocks = 3, kAdamBlocks = 2;
inline constexpr int kWarp = 32;
inline constexpr int kMaxWarps = 32;

// The block's one object in shared memory, uninitialised. One type per kernel.
template <class T>
__device__ T& shared() {
#if defined(SAM_FUSED_EMULATED)
  return *static_cast<T*>(sam_emulation::shared_memory(sizeof(T), alignof(T)));
#else
  __shared__ T memory;
  return memory;
#endif
}

struct SumScratch {
  double small[kMaxWarps], middle[kMaxWarps], big[kMaxWarps];
};

__device__ inline SumOfSquares warp_sum(SumOfSquares sum) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    SumOfSquares other;
    other.small = __shfl_down_sync(0xffffffff, sum.small, offset);
    other.middle = __shfl_down_sync(0xffffffff, sum.middle, offset);
    other.big = __shfl_down_sync(0xffffffff, sum.big, offset);
    sum = sum + other;
  }
  return sum;
}

// The sum over the block, in thread 0; the same tree every time. All threads must call it, blocks are whole warps.
__device__ inline SumOfSquares block_sum(SumScratch& scratch, SumOfSquares sum) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  __syncthreads();  // whoever used the scratch before has read it
  sum = warp_sum(sum);
  if (lane == 0) {
    scratch.small[warp] = sum.small;
    scratch.middle[warp] = sum.middle;
    scratch.big[warp] = sum.big;
  }
  __syncthreads();
  if (warp != 0) return {};
  SumOfSquares total;
  if (lane < warps) {
    total.small = scratch.small[lane];
    total.middle = scratch.middle[lane];
    total.big = scratch.big[lane];
  }
  return warp_sum(total);
}

// True in one block of the grid, the last to get here: everything that the others wrote before is visible to it. The ticket is
// 0 before and afterwards. (Threads of other blocks may still run, but not before this point.)
__device__ inline bool is_last_block(uint32_t* ticket, bool& last) {
  __syncthreads();  // every thread of the block has done what it does before
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (last) *ticket = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

__device__ inline double value_or(const Scalar& scalar, double otherwise) {
  if (scalar.address == nullptr) return otherwise;
  return scalar.wide ? *static_cast<const double*>(scalar.address)
                     : static_cast<double>(*static_cast<const float*>(scalar.address));
}

__device__ inline double grad_factor(const GradPolicy& policy) {
  return value_or(policy.inv_scale, 1) * value_or(policy.clip, 1);
}
__device__ inline bool skips(const GradPolicy& policy) { return value_or(policy.found_inf, 0) != 0; }

__device__ inline const double* hyper_row(const Hyper& hyper, int64_t group, int64_t columns) {
  return (hyper.table != nullptr ? hyper.table : hyper.values) + group * columns;
}

__device__ inline void* gradient_of(const Gradients& gradients, const Launch& launch, int64_t tensor) {
  return reinterpret_cast<void*>(gradients.addresses[tensor - launch.first_tensor]);
}

// The elements of chunks [c, end) that belong to the tensor of chunk c. The whole block searches: each thread compares with one
// of as many tensors, evenly spread, and then within the gap that is left. Two loads and two barriers for any number of
// tensors, where a binary search of a thousand would be ten dependent loads.
__device__ inline Chunk find_chunks(const Launch& launch, int64_t c, int64_t end) {
  int64_t tensor = launch.first_tensor, left = launch.tensors, stride;
  do {
    stride = (left + blockDim.x - 1) / blockDim.x;
    const int64_t offset = threadIdx.x * stride;
    // The first tensor starts at or before c, and so does a prefix of the others.
    const int starts_before = __syncthreads_count(offset < left && launch.first_chunk[tensor + offset] <= c);
    const int64_t skipped = (starts_before - 1) * stride;
    tensor += skipped;
    left = left - skipped < stride ? left - skipped : stride;
  } while (stride > 1);
  const int64_t first = launch.first_chunk[tensor], numel = launch.rows[tensor].numel;
  const int64_t begin = (c - first) * kBlockChunk, stop = (end - first) * kBlockChunk;
  return {tensor, begin, (stop < numel ? stop : numel) - begin};
}

}  // namespace sam_fused::cuda
