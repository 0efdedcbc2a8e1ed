// The storage types: their sizes and the conversions between them and the arithmetic's types. One file for g++ and nvcc.
#pragma once

#include <cstdint>

#include "element.h"
#include "plan.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace sam_fused {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SAM_FUSED_HD int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

SAM_FUSED_HD uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
#endif
}

SAM_FUSED_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
#endif
}

SAM_FUSED_HD uint64_t bits_of(double value) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(__double_as_longlong(value));
#else
  uint64_t bits;
  __builtin_memcpy(&bits, &value, 8);
  return bits;
#endif
}

SAM_FUSED_HD double double_of(uint64_t bits) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<long long>(bits));
#else
  double value;
  __builtin_memcpy(&value, &bits, 8);
  return value;
#endif
}

SAM_FUSED_HD float from_bfloat16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

SAM_FUSED_HD uint16_t to_bfloat16(float value) {
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // nearest, ties to even
  const uint32_t nan = (bits >> 16) | 0x0040;                           // quiet, and never rounded up to infinity
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
#endif
}

// Left to right: infinities and NaNs, normal numbers, and subnormals by exact float arithmetic.
SAM_FUSED_HD float from_float16(uint16_t half) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(half));
#else
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
    if (magnitude > 0x7c00) bits |= 0x00400000;
  } else if (magnitude >= 0x0400) {
    bits = (magnitude << 13) + (uint32_t(127 - 15) << 23);
  } else {
    bits = bits_of(float(int32_t(magnitude)) * 0x1p-24f);
  }
  return float_of(bits | sign);
#endif
}

SAM_FUSED_HD uint16_t to_float16(float value) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    half = 0x7c00;
  } else if (magnitude >= 0x38800000) {  // 2^-14, the smallest normal
    const uint32_t rebased = magnitude - (uint32_t(127 - 15) << 23);
    half = (rebased + 0xfff + ((rebased >> 13) & 1)) >> 13;
  } else {
    // Adding 2^-1 makes the float adder round at 2^-24, half's last subnormal bit.
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  }
  return static_cast<uint16_t>(sign | half);
#endif
}

// A stored value in the arithmetic's type T, and back with one rounding.
template <class T, class S>
SAM_FUSED_HD T widened(S stored) {
  return static_cast<T>(stored);
}
template <class T>
SAM_FUSED_HD T widened(BFloat16 stored) {
  return static_cast<T>(from_bfloat16(stored.bits));
}
template <class T>
SAM_FUSED_HD T widened(Float16 stored) {
  return static_cast<T>(from_float16(stored.bits));
}

template <class S>
struct Narrowed {
  template <class T>
  SAM_FUSED_HD static S of(T value) {
    return static_cast<S>(value);
  }
};
template <>
struct Narrowed<BFloat16> {
  template <class T>
  SAM_FUSED_HD static BFloat16 of(T value) {
    return {to_bfloat16(static_cast<float>(value))};
  }
};
template <>
struct Narrowed<Float16> {
  template <class T>
  SAM_FUSED_HD static Float16 of(T value) {
    return {to_float16(static_cast<float>(value))};
  }
};

}  // namespace sam_fused
