// Launches: blocks one after another on the calling thread, and what the CUDA runtime reports about a launch.
//
// A kernel may not wait for another block, and what only blocks that run side by side can show is not seen here: a missing
// __threadfence, atomics that are not.
#pragma once

#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "block.h"

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719,
};
using cudaError = cudaError_t;
using cudaStream_t = struct CUstream_st*;

namespace sam_emulation {

// What the host can see and set. One per host thread, as CUDA's last error is.
struct Runtime {
  std::optional<Orders> orders;    // none: the environment's
  uint64_t launches = 0;           // that ran, since the orders were set
  unsigned threads_per_block = 0;  // 0: as many as the source asks for
  cudaError_t last_error = cudaSuccess;
  cudaError_t next_launch = cudaSuccess;  // what a launch gives instead of running, after
  unsigned launches_before = 0;           // so many that do run
  std::string message;                    // of the last call of `caught`, empty where it went well
  Block::Fibers fibers;
};

inline Runtime& runtime() {
  static thread_local Runtime instance;
  return instance;
}

inline void set_orders(const Orders& orders) {
  runtime().orders = orders;
  runtime().launches = 0;
}

// What a launch whose kernel works with any block size should use: a small block shows the same faults in less time.
inline unsigned threads_per_block(unsigned wanted) {
  return runtime().threads_per_block != 0 ? runtime().threads_per_block : wanted;
}

// After `before` launches that run, one does not: cudaGetLastError() gives `error`.
inline void fail_next_launch(cudaError_t error, unsigned before = 0) {
  runtime().next_launch = error;
  runtime().launches_before = before;
}

// Calls f; where it throws, keeps the message for sam_emulation_message() and returns false. For C interfaces.
template <class F>
bool caught(F&& f) noexcept {
  try {
    f();
    runtime().message.clear();
    return true;
  } catch (const std::exception& error) {
    runtime().message = error.what();
  } catch (...) {
    runtime().message = "something that is no std::exception was thrown";
  }
  return false;
}

inline bool launchable(dim3 grid, dim3 block) {
  constexpr uint64_t kMostX = 2147483647, kMostYZ = 65535, kMostThreads = 1024, kMostZ = 64;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return threads > 0 && block.x <= kMostThreads && block.y <= kMostThreads && block.z <= kMostZ && threads <= kMostThreads &&
         grid.x > 0 && grid.x <= kMostX && grid.y > 0 && grid.y <= kMostYZ && grid.z > 0 && grid.z <= kMostYZ;
}

inline void run_grid(dim3 grid, dim3 size, void (*kernel)(void*), void* arguments) {
  Runtime& state = runtime();
  if (running_block != nullptr) throw std::runtime_error("launch: expected a call from the host, got one from a kernel");
  const bool refuses = state.launches_before == 0 || state.launches_before-- == 0;
  const cudaError_t refused = refuses ? std::exchange(state.next_launch, cudaSuccess) : cudaSuccess;
  if (refused != cudaSuccess || !launchable(grid, size)) {
    state.last_error = refused != cudaSuccess ? refused : cudaErrorInvalidConfiguration;
    return;
  }
  const Orders orders = state.orders ? *state.orders : orders_from_environment();
  Random random(orders.seed * 0x9e3779b97f4a7c15u + state.launches++);
  std::vector<uint32_t> order(size_t{grid.x} * grid.y * grid.z);
  arrange(order, orders.blocks, random);

  Block block(size, orders, random, state.fibers, kernel, arguments);
  running_block = &block;
  gridDim = grid;
  blockDim = size;
  try {
    for (const uint32_t i : order) {
      blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
      block.run();
    }
  } catch (...) {
    running_block = nullptr;
    state.fibers.clear();  // they are in the middle of a kernel and would go on with it
    throw;
  }
  running_block = nullptr;
}

// kernel<<<grid, block>>>(arguments...). The arguments are converted to the kernel's parameters once; every thread gets a copy.
// Throws std::runtime_error where the block deadlocks or uses a barrier in a way that CUDA leaves undefined.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "as many arguments as the kernel has parameters");
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "kernel parameters are copied as bytes");
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_cv_t<Parameters>...> parameters;
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  static_assert((sizeof(std::remove_cv_t<Parameters>) + ... + 0) <= 32764, "kernel parameters take at most 32764 bytes");
  run_grid(
      grid, block,
      [](void* given) {
        const Call& made = *static_cast<const Call*>(given);
        std::apply(made.kernel, made.parameters);
      },
      &call);
}

// A block's shared memory of this size and alignment: the same address for every thread. Objects of the same size and
// alignment are told apart by `key` alone.
inline void* shared_memory(size_t size, size_t align, const void* key = nullptr) {
  return here("shared memory").shared_memory(key, size, align);
}

template <class T>
inline char key_of_type = 0;

// The block's object of type T.
template <class T>
T& shared() {
  static_assert(std::is_trivially_default_constructible_v<T>, "a __shared__ object has no initializer");
  return *static_cast<T*>(shared_memory(sizeof(T), alignof(T), &key_of_type<T>));
}

}  // namespace sam_emulation

// For ctypes, and for whoever loads a library of emulated kernels.
#define SAM_EMULATION_EXPORT extern "C" __attribute__((used, visibility("default"))) inline

SAM_EMULATION_EXPORT void sam_emulation_set_orders(int threads, int blocks, uint64_t seed) {
  sam_emulation::set_orders({static_cast<sam_emulation::Order>(threads), static_cast<sam_emulation::Order>(blocks), seed});
}
SAM_EMULATION_EXPORT void sam_emulation_set_threads_per_block(unsigned threads) {
  sam_emulation::runtime().threads_per_block = threads;
}
SAM_EMULATION_EXPORT void sam_emulation_fail_next_launch(int error, unsigned before) {
  sam_emulation::fail_next_launch(static_cast<cudaError_t>(error), before);
}
SAM_EMULATION_EXPORT uint64_t sam_emulation_launches() { return sam_emulation::runtime().launches; }
SAM_EMULATION_EXPORT const char* sam_emulation_message() { return sam_emulation::runtime().message.c_str(); }
