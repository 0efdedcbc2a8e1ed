// Reading and writing a chunk's elements: 16 bytes at a time where all operands share a dtype and are aligned, element by
// element where not, and with a conversion per operand where dtypes differ. An accumulator is stored in the arithmetic's type
// and shares nobody's dtype: beside halves it takes two accesses for each of theirs.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/device.h"
#include "plan.h"
#include "storage.h"

namespace sam_fused::cuda {

inline constexpr int kAccessBytes = 16;

// An address that came out of a table: said to be of global memory, or every access would first find out which memory it is.
template <class P>
__device__ P* global(P* address) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

// V stored values that are read or written together, by one instruction up to 16 bytes. No more may be claimed of its
// alignment: addresses are looked at for multiples of 16 alone.
template <class S, int V>
struct alignas(std::min<size_t>(sizeof(S) * V, kAccessBytes)) Pack {
  S values[V];
};

template <int kAccesses>
struct Words {
  uint4 accesses[kAccesses];
};

// Stores of 16 bytes. Spelt out: left to itself nvcc takes packs apart and stores 4 bytes at a time (seen for sm_80 and sm_90).
template <class P>
__device__ void store_whole(P* address, const P& pack) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(P) % kAccessBytes == 0) {
    constexpr int kAccesses = sizeof(P) / kAccessBytes;
    const auto words = __builtin_bit_cast(Words<kAccesses>, pack);
    const size_t to = __cvta_generic_to_global(address);
#pragma unroll
    for (int n = 0; n < kAccesses; ++n) {
      const uint4 part = words.accesses[n];
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to + n * kAccessBytes), "r"(part.x), "r"(part.y),
                   "r"(part.z), "r"(part.w)
                   : "memory");
    }
    return;
  }
#endif
  *global(address) = pack;
}

// An operand of one known storage type.
template <class S>
struct Typed {
  static constexpr int kWidth = kAccessBytes / sizeof(S);
  S* data;

  __device__ static Typed at(void* address, DType) { return {static_cast<S*>(address)}; }

  template <int V>
  __device__ Pack<S, V> load(int64_t i) const {
    return *global(reinterpret_cast<const Pack<S, V>*>(data + i));
  }
  template <int V>
  __device__ void store(int64_t i, const Pack<S, V>& pack) const {
    store_whole(reinterpret_cast<Pack<S, V>*>(data + i), pack);
  }
  template <class T, class P>
  __device__ T get(const P& pack, int v) const {
    return widened<T>(pack.values[v]);
  }
  template <class T, class P>
  __device__ void set(P& pack, int v, T value) const {
    pack.values[v] = Narrowed<S>::of(value);
  }
};

// An operand whose storage type is known at run time alone; a pack holds the bits of one value.
struct Any {
  static constexpr int kWidth = 1;
  char* data;
  DType dtype;

  __device__ static Any at(void* address, DType dtype) { return {static_cast<char*>(address), dtype}; }

  template <int V>
  __device__ Pack<uint64_t, 1> load(int64_t i) const {
    const char* from = global(data + i * size_of(dtype));
    switch (dtype) {
      case DType::kFloat64: return {{*reinterpret_cast<const uint64_t*>(from)}};
      case DType::kFloat32: return {{*reinterpret_cast<const uint32_t*>(from)}};
      default: return {{*reinterpret_cast<const uint16_t*>(from)}};
    }
  }
  template <int V>
  __device__ void store(int64_t i, const Pack<uint64_t, 1>& pack) const {
    char* to = global(data + i * size_of(dtype));
    switch (dtype) {
      case DType::kFloat64: *reinterpret_cast<uint64_t*>(to) = pack.values[0]; break;
      case DType::kFloat32: *reinterpret_cast<uint32_t*>(to) = static_cast<uint32_t>(pack.values[0]); break;
      default: *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(pack.values[0]);
    }
  }
  template <class T>
  __device__ T get(const Pack<uint64_t, 1>& pack, int) const {
    const uint64_t bits = pack.values[0];
    switch (dtype) {
      case DType::kFloat64: return static_cast<T>(double_of(bits));
      case DType::kFloat32: return static_cast<T>(float_of(static_cast<uint32_t>(bits)));
      case DType::kBFloat16: return widened<T>(BFloat16{static_cast<uint16_t>(bits)});
      default: return widened<T>(Float16{static_cast<uint16_t>(bits)});
    }
  }
  template <class T>
  __device__ void set(Pack<uint64_t, 1>& pack, int, T value) const {
    switch (dtype) {
      case DType::kFloat64: pack.values[0] = bits_of(static_cast<double>(value)); break;
      case DType::kFloat32: pack.values[0] = bits_of(static_cast<float>(value)); break;
      case DType::kBFloat16: pack.values[0] = Narrowed<BFloat16>::of(value).bits; break;
      default: pack.values[0] = Narrowed<Float16>::of(value).bits;
    }
  }
};

// An operand to read the gradient of several micro-batches from: what was accumulated plus the weighted one of the last.
template <class A, class T>
struct SummedGradient {
  A last;
  Typed<T> sum;
  T share;  // the weight of the last

  template <int V, class P>
  struct Packs {
    P last;
    Pack<T, V> sum;
  };

  template <int V>
  __device__ auto load(int64_t i) const {
    auto loaded = last.template load<V>(i);
    return Packs<V, decltype(loaded)>{loaded, sum.template load<V>(i)};
  }
  template <class, class P>
  __device__ T get(const P& packs, int v) const {
    return accumulated(sum.template get<T>(packs.sum, v), last.template get<T>(packs.last, v), share);
  }
};

// The operand that a pass reads its gradient from.
template <bool kAccumulates, class A, class T>
__device__ auto gradient_operand(const TensorRow& row, void* gradient, double share) {
  const A last = A::at(gradient, row.dtype(kGrad));
  if constexpr (kAccumulates) {
    return SummedGradient<A, T>{last, Typed<T>::at(row.address[kAccumulator], {}), static_cast<T>(share)};
  } else {
    return last;
  }
}

template <class A, class T>
struct Access {
  using Operand = A;
  using Arithmetic = T;
};

// What the operands in `used` (a bit per role) have in common.
struct Survey {
  DType dtype;   // of the first of them
  bool uniform;  // whether it is every one's but the accumulator's
  bool aligned;  // whether every address is a multiple of 16 bytes
};

__device__ inline Survey survey(const TensorRow& row, const void* gradient, uint32_t used) {
  Survey found{DType::kFloat32, true, true};
  bool first = true;
  for (int r = kWeight; r < kRoles; ++r) {
    if ((used >> r & 1) == 0) continue;
    const Role role = static_cast<Role>(r);
    const void* address = role == kGrad ? gradient : row.address[role];
    found.aligned = found.aligned && reinterpret_cast<uintptr_t>(address) % kAccessBytes == 0;
    if (role == kAccumulator) continue;
    const DType dtype = row.dtype(role);
    if (first) found.dtype = dtype;
    first = false;
    found.uniform = found.uniform && dtype == found.dtype;
  }
  return found;
}

SAM_FUSED_HD constexpr uint32_t bit(Role role) { return 1u << role; }

// Of what a pass reads its gradient from.
template <bool kAccumulates>
SAM_FUSED_HD constexpr uint32_t gradient_bits() {
  return bit(kGrad) | (kAccumulates ? bit(kAccumulator) : 0);
}

// f(Access<operand, arithmetic's type>): `deciding` is the dtype that decides whether the arithmetic is in fp64.
template <class F>
__device__ void with_access(const Survey& found, DType deciding, F f) {
  if (!found.uniform) {
    if (deciding == DType::kFloat64) f(Access<Any, double>{});
    else f(Access<Any, float>{});
    return;
  }
  switch (found.dtype) {
    case DType::kFloat32: return f(Access<Typed<float>, float>{});
    case DType::kFloat64: return f(Access<Typed<double>, double>{});
    case DType::kBFloat16: return f(Access<Typed<BFloat16>, float>{});
    case DType::kFloat16: return f(Access<Typed<Float16>, float>{});
  }
}

// f(width, first element): the block's threads go through the chunk side by side, `width` elements each, and one each through
// what is left. kUnroll iterations have their loads in flight together where f does not store.
template <int V, int kUnroll = 1, class F>
__device__ void sweep(const Chunk& chunk, bool aligned, F f) {
  const int64_t end = chunk.begin + chunk.count;
  int64_t body = chunk.begin;
  if (V > 1 && aligned) {
    body += chunk.count / V * V;
#pragma unroll kUnroll
    for (int64_t i = chunk.begin + int64_t{threadIdx.x} * V; i < body; i += int64_t{blockDim.x} * V) {
      f(std::integral_constant<int, V>{}, i);
    }
  }
  for (int64_t i = body + threadIdx.x; i < end; i += blockDim.x) f(std::integral_constant<int, 1>{}, i);
}

// to = from, bit for bit.
template <class S>
__device__ void copy_as(void* to, void* from, const Chunk& chunk) {
  const auto target = Typed<S>::at(to, {}), source = Typed<S>::at(from, {});
  const bool aligned = (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % kAccessBytes == 0;
  sweep<Typed<S>::kWidth>(chunk, aligned, [&](auto width, int64_t i) {
    constexpr int V = decltype(width)::value;
    target.template store<V>(i, source.template load<V>(i));
  });
}

__device__ inline void copy_chunk(void* to, void* from, DType dtype, const Chunk& chunk) {
  if (to == from) return;
  switch (size_of(dtype)) {
    case 8: return copy_as<uint64_t>(to, from, chunk);
    case 4: return copy_as<uint32_t>(to, from, chunk);
    default: return copy_as<uint16_t>(to, from, chunk);
  }
}

}  // namespace sam_fused::cuda
