// CUDA's built-in types and index variables, with CUDA's alignments.
#pragma once

#include <type_traits>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define SAM_EMULATION_VECTORS(T, name, align2, align4)         \
  struct alignas(align2) name##2 {                             \
    T x, y;                                                    \
  };                                                           \
  struct alignas(align4) name##4 {                             \
    T x, y, z, w;                                              \
  };                                                           \
  constexpr name##2 make_##name##2(T x, T y) {                 \
    return {x, y};                                             \
  }                                                            \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) {       \
    return {x, y, z, w};                                       \
  }

SAM_EMULATION_VECTORS(unsigned char, uchar, 2, 4)
SAM_EMULATION_VECTORS(short, short, 4, 8)
SAM_EMULATION_VECTORS(unsigned short, ushort, 4, 8)
SAM_EMULATION_VECTORS(int, int, 8, 16)
SAM_EMULATION_VECTORS(unsigned, uint, 8, 16)
SAM_EMULATION_VECTORS(float, float, 8, 16)
#undef SAM_EMULATION_VECTORS

// Of 8-byte elements only pairs: four are more than one access of 16 bytes.
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) longlong2 {
  long long x, y;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
constexpr double2 make_double2(double x, double y) { return {x, y}; }
constexpr longlong2 make_longlong2(long long x, long long y) { return {x, y}; }
constexpr ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

// The block and the thread that run: set by the scheduler before each switch.
inline thread_local constinit uint3 threadIdx{}, blockIdx{};
inline thread_local constinit dim3 blockDim{}, gridDim{};
inline constexpr int warpSize = 32;

namespace sam_emulation {

template <class T, class... Ts>
inline constexpr bool kOneOf = (std::is_same_v<T, Ts> || ...);

// What one shuffle moves.
template <class T>
concept Shuffled = kOneOf<T, int, unsigned, long, unsigned long, long long, unsigned long long, float, double>;

// What CUDA has loads and stores with a cache hint for.
template <class T>
concept Hinted = Shuffled<T> ||
                 kOneOf<T, char, signed char, unsigned char, short, unsigned short, uchar2, uchar4, short2, short4, ushort2,
                        ushort4, int2, int4, uint2, uint4, float2, float4, double2, longlong2, ulonglong2>;

}  // namespace sam_emulation
