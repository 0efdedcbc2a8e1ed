// CUDA's vocabulary for g++: found before the toolkit's header of this name, it makes a .cu file a C++ file whose kernels run
// on the CPU (sam_emulation::launch in grid.h). `__shared__` is left undefined on purpose: shared memory goes through
// sam_emulation::shared<T>().
#pragma once

#if !defined(SAM_FUSED_EMULATED)
#error "expected -DSAM_FUSED_EMULATED with the emulation on the include path, got neither nvcc nor that"
#endif

#include <math.h>  // CUDA has isnan, sqrtf and the like outside namespaces

#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>
#include <type_traits>
#include <utility>

#include "block.h"
#include "grid.h"
#include "types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) alignas(n)

// ---- block barriers -----------------------------------------------------------------------------------------------------

#define SAM_EMULATION_HERE std::source_location where = std::source_location::current()

inline void __syncthreads(SAM_EMULATION_HERE) {
  sam_emulation::here("__syncthreads").block_barrier({"__syncthreads", where}, false);
}
inline int __syncthreads_count(int predicate, SAM_EMULATION_HERE) {
  return sam_emulation::here("__syncthreads_count").block_barrier({"__syncthreads_count", where}, predicate != 0);
}
inline int __syncthreads_or(int predicate, SAM_EMULATION_HERE) {
  return sam_emulation::here("__syncthreads_or").block_barrier({"__syncthreads_or", where}, predicate != 0) > 0;
}
inline int __syncthreads_and(int predicate, SAM_EMULATION_HERE) {
  return sam_emulation::here("__syncthreads_and").block_barrier({"__syncthreads_and", where}, predicate == 0) == 0;
}

// ---- warp operations ----------------------------------------------------------------------------------------------------

namespace sam_emulation {

inline uint32_t vote(const char* what, std::source_location where, unsigned mask, bool predicate) {
  Block& block = here(what);
  return block.warp_operation({what, where}, mask, predicate, block.lane()).votes;
}

// `source_of` gets the calling lane and the first and the last of its segment of `width` lanes, and gives the lane to read.
template <Shuffled T, class SourceOf>
T shuffled(const char* what, std::source_location where, unsigned mask, T value, int width, SourceOf source_of) {
  Block& block = here(what);
  if (width < 1 || width > warpSize || (width & (width - 1)) != 0)
    block.fail(std::string(what) + ": expected a width of 1, 2, 4, 8, 16 or 32, got " + std::to_string(width));
  const int64_t lane = block.lane(), first = lane / width * width;
  const auto source = static_cast<uint32_t>(source_of(lane, first, first + width - 1));
  uint64_t bytes = 0;
  std::memcpy(&bytes, &value, sizeof value);
  bytes = block.warp_operation({what, where}, mask, bytes, source).received;
  std::memcpy(&value, &bytes, sizeof value);
  return value;
}

}  // namespace sam_emulation

inline void __syncwarp(unsigned mask = 0xffffffff, SAM_EMULATION_HERE) {
  sam_emulation::vote("__syncwarp", where, mask, false);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SAM_EMULATION_HERE) {
  return sam_emulation::vote("__ballot_sync", where, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, SAM_EMULATION_HERE) {
  return sam_emulation::vote("__any_sync", where, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SAM_EMULATION_HERE) {
  return sam_emulation::vote("__all_sync", where, mask, predicate == 0) == 0;
}

template <sam_emulation::Shuffled T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SAM_EMULATION_HERE) {
  return sam_emulation::shuffled("__shfl_sync", where, mask, value, width,
                                 [&](int64_t, int64_t first, int64_t) { return first + (lane & (width - 1)); });
}
template <sam_emulation::Shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SAM_EMULATION_HERE) {
  return sam_emulation::shuffled("__shfl_down_sync", where, mask, value, width, [&](int64_t own, int64_t, int64_t last) {
    return own + delta <= last ? own + delta : own;
  });
}
template <sam_emulation::Shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SAM_EMULATION_HERE) {
  return sam_emulation::shuffled("__shfl_up_sync", where, mask, value, width, [&](int64_t own, int64_t first, int64_t) {
    return own - delta >= first ? own - delta : own;
  });
}
// As CUDA has it, a lane may read from an earlier segment and not from a later one.
template <sam_emulation::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SAM_EMULATION_HERE) {
  return sam_emulation::shuffled("__shfl_xor_sync", where, mask, value, width, [&](int64_t own, int64_t, int64_t last) {
    return (own ^ lanes) <= last ? own ^ lanes : own;
  });
}

// ---- memory ---------------------------------------------------------------------------------------------------------------

inline void __threadfence() { sam_emulation::here("__threadfence"); }
inline void __threadfence_block() { sam_emulation::here("__threadfence_block"); }

// Blocks and threads run one at a time, so a plain update is atomic.
inline int atomicAdd(int* address, int value) { return std::exchange(*address, *address + value); }
inline unsigned atomicAdd(unsigned* address, unsigned value) { return std::exchange(*address, *address + value); }
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return std::exchange(*address, *address + value);
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return std::exchange(*address, *address >= last ? 0 : *address + 1);
}
inline unsigned atomicExch(unsigned* address, unsigned value) { return std::exchange(*address, value); }
inline int atomicExch(int* address, int value) { return std::exchange(*address, value); }
inline unsigned atomicOr(unsigned* address, unsigned value) { return std::exchange(*address, *address | value); }
inline int atomicOr(int* address, int value) { return std::exchange(*address, *address | value); }

namespace sam_emulation {

// The hardware refuses what is not aligned to the type's size; a plain access on the CPU would not.
template <Hinted T>
void check_alignment(const char* what, const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) == 0) return;
  here(what).fail(std::string(what) + ": expected an address aligned to " + std::to_string(sizeof(T)) + " bytes, got one " +
                  std::to_string(reinterpret_cast<uintptr_t>(address) % sizeof(T)) + " bytes past: use narrower accesses");
}

}  // namespace sam_emulation

#define SAM_EMULATION_LOAD(name)                    \
  template <sam_emulation::Hinted T>                \
  T name(const T* address) {                        \
    sam_emulation::check_alignment(#name, address); \
    return *address;                                \
  }
#define SAM_EMULATION_STORE(name)                        \
  template <sam_emulation::Hinted T>                     \
  void name(T* address, std::type_identity_t<T> value) { \
    sam_emulation::check_alignment(#name, address);      \
    *address = value;                                    \
  }
SAM_EMULATION_LOAD(__ldg)
SAM_EMULATION_LOAD(__ldca)
SAM_EMULATION_LOAD(__ldcg)
SAM_EMULATION_LOAD(__ldcs)
SAM_EMULATION_LOAD(__ldcv)
SAM_EMULATION_LOAD(__ldlu)
SAM_EMULATION_STORE(__stcg)
SAM_EMULATION_STORE(__stcs)
SAM_EMULATION_STORE(__stwb)
SAM_EMULATION_STORE(__stwt)

// ---- errors ---------------------------------------------------------------------------------------------------------------

inline cudaError_t cudaPeekAtLastError() { return sam_emulation::runtime().last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(sam_emulation::runtime().last_error, cudaSuccess); }

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
  }
  return "unrecognized error code";
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
  }
  return "unrecognized error code";
}
