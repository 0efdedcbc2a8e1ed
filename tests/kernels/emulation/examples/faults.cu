// Kernels that are wrong, each in one way that the emulation has to show.
#include <memory>

#include "examples.h"

namespace {

__global__ void no_barrier_after_writing_kernel(const float* x, float* out) {
  out[threadIdx.x] = block_sum<true, false>(x[threadIdx.x]);
}

// The second sum's totals overwrite the first's while other warps still read those.
__global__ void no_barrier_before_writing_kernel(const float* x, float* out) {
  const float once = block_sum<false, true>(x[threadIdx.x]);
  out[threadIdx.x] = once + block_sum<false, true>(2 * x[threadIdx.x]);
}

__global__ void barrier_in_two_branches_kernel() {
  if (threadIdx.x < 10) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

template <class T>
__device__ void barrier_of() {
  __syncthreads();
}

// One line of the source, and two barriers.
__global__ void barrier_in_two_instances_kernel() {
  if (threadIdx.x < 10) {
    barrier_of<int>();
  } else {
    barrier_of<float>();
  }
}

__global__ void early_return_kernel() {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void block_and_warp_barrier_kernel() {
  if (threadIdx.x == 40) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

__global__ void missing_lane_kernel(int* out) {
  if (threadIdx.x != 3) out[threadIdx.x] = __shfl_down_sync(0xffffffff, 1, 1);
}

__global__ void lane_outside_its_mask_kernel(int* out) { out[threadIdx.x] = __shfl_sync(0x0000ffff, 1, 0); }

__global__ void two_masks_kernel(int* out) {
  out[threadIdx.x] = __shfl_sync(threadIdx.x < 4 ? 0x000000ff : 0xffffffff, 1, 0);
}

__global__ void two_operations_kernel(unsigned* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __ballot_sync(0xffffffff, 1);
  } else {
    out[threadIdx.x] = __any_sync(0xffffffff, 1);
  }
}

// The upper lanes' sources are outside of the mask.
__global__ void source_outside_the_mask_kernel(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(0x0000ffff, 1.0f, 8);
}

__global__ void full_mask_kernel(unsigned* out) { out[threadIdx.x] = __ballot_sync(0xffffffff, 1); }

__global__ void width_kernel(int width, int* out) { out[threadIdx.x] = __shfl_sync(0xffffffff, 1, 0, width); }

// Reads what this block has not written: block 0 leaves something behind.
__global__ void uninitialised_kernel(float* out) {
  Totals& totals = shared<Totals>();
  out[blockIdx.x * blockDim.x + threadIdx.x] = totals.value[threadIdx.x % 32];
  __syncthreads();
  totals.value[threadIdx.x % 32] = 1;
}

__global__ void global_overrun_kernel(float* out, int size) {
  if (static_cast<int>(threadIdx.x) <= size) out[threadIdx.x] = 1;
}

__global__ void shared_index_kernel(int index, float* out) {
  Totals& totals = shared<Totals>();
  (totals.value + 0)[index] = 1;
  __syncthreads();
  out[0] = totals.value[0];
}

struct alignas(16) Pack {
  float values[4];
};
__global__ void misaligned_store_kernel(float* out) { *reinterpret_cast<Pack*>(out) = Pack{{1, 2, 3, 4}}; }
__global__ void misaligned_load_kernel(const float* x, float* out) {
  const Pack pack = *reinterpret_cast<const Pack*>(x);
  for (int i = 0; i < 4; ++i) out[i] = pack.values[i];
}
__global__ void misaligned_hinted_kernel(const float* x, float* out) { *out = __ldcs(reinterpret_cast<const float4*>(x)).x; }

// A struct of floats in shared memory is aligned to 4 bytes, whatever the machine makes of it.
__global__ void misaligned_shared_kernel(float* out) {
  *reinterpret_cast<Pack*>(shared<Totals>().value) = Pack{{1, 2, 3, 4}};
  __syncthreads();
  out[0] = shared<Totals>().value[3];
}

}  // namespace

EXPORT bool no_barrier_after_writing(int n, const float* x, float* out) {
  return run(no_barrier_after_writing_kernel, 1, n, x, out);
}
EXPORT bool no_barrier_before_writing(int n, const float* x, float* out) {
  return run(no_barrier_before_writing_kernel, 1, n, x, out);
}
EXPORT bool barrier_in_two_branches(int n) { return run(barrier_in_two_branches_kernel, 2, n); }
EXPORT bool barrier_in_two_instances(int n) { return run(barrier_in_two_instances_kernel, 2, n); }
EXPORT bool early_return(int n) { return run(early_return_kernel, dim3(3, 2), n); }
EXPORT bool block_and_warp_barrier(int n) { return run(block_and_warp_barrier_kernel, 1, n); }
EXPORT bool missing_lane(int n, int* out) { return run(missing_lane_kernel, 1, n, out); }
EXPORT bool lane_outside_its_mask(int n, int* out) { return run(lane_outside_its_mask_kernel, 1, n, out); }
EXPORT bool two_masks(int n, int* out) { return run(two_masks_kernel, 1, n, out); }
EXPORT bool two_operations(int n, unsigned* out) { return run(two_operations_kernel, 1, n, out); }
EXPORT bool source_outside_the_mask(int n, float* out) { return run(source_outside_the_mask_kernel, 1, n, out); }
EXPORT bool full_mask(int n, unsigned* out) { return run(full_mask_kernel, 1, n, out); }
EXPORT bool shuffle_width(int width, int* out) { return run(width_kernel, 1, 32, width, out); }
EXPORT bool uninitialised(int blocks, int n, float* out) { return run(uninitialised_kernel, blocks, n, out); }
EXPORT bool global_overrun(int size) {
  const auto out = std::make_unique<float[]>(size);
  return run(global_overrun_kernel, 1, 128, out.get(), size);
}
EXPORT bool shared_index(int index) {
  float out;
  return run(shared_index_kernel, 1, 32, index, &out);
}
EXPORT bool misaligned_store(int offset) {
  alignas(16) float out[8];
  return run(misaligned_store_kernel, 1, 1, out + offset);
}
EXPORT bool misaligned_load(int offset) {
  alignas(16) float x[8] = {}, out[4];
  return run(misaligned_load_kernel, 1, 1, x + offset, out);
}
EXPORT bool misaligned_hinted(int offset) {
  alignas(16) float x[8] = {}, out;
  return run(misaligned_hinted_kernel, 1, 1, x + offset, &out);
}
EXPORT bool misaligned_shared() {
  float out;
  return run(misaligned_shared_kernel, 1, 1, &out);
}

#if defined(SAM_FUSED_EMULATED)
// What nvcc refuses to compile, and what it cannot.
namespace {

struct TooMuch {
  char bytes[48 * 1024 + 1];
};
void too_much_shared_kernel() { shared<TooMuch>(); }

void deep_stack_kernel(float* out) {
  volatile char frame[sam_emulation::Stack::kBytes + 1024];
  frame[0] = 1;
  *out = frame[0];
}

}  // namespace

EXPORT bool too_much_shared() { return run(too_much_shared_kernel, 1, 32); }
EXPORT bool deep_stack(float* out) { return run(deep_stack_kernel, 1, 32, out); }
EXPORT bool barrier_on_the_host() {
  return sam_emulation::caught([] { __syncthreads(); });
}
#endif
