// Every function of the headers that g++ and nvcc share, as a kernel of its own: its PTX shows what nvcc made of it.
#include <cstdint>

#include "element.h"
#include "hyper.h"
#include "squares.h"
#include "storage.h"

using namespace sam_fused;

#define KERNEL extern "C" __global__ void

template <class T>
__device__ SgdConstants<T> sgd_of(const T* k) {
  return {k[0], k[1], k[2], k[3], k[4], true, true, true};
}
template <class T>
__device__ AdamConstants<T> adam_of(const T* k) {
  return {k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7], k[8], true, true};
}

#define FOR_BOTH(T, suffix)                                                                                              \
  KERNEL perturbed_##suffix(const T* x, T* out) { *out = perturbed(x[0], x[1], x[2]); }                                  \
  KERNEL perturbed_adaptive_##suffix(const T* x, T* out) { *out = perturbed_adaptive(x[0], x[1], x[2]); }                \
  KERNEL accumulated_##suffix(const T* x, T* out) { *out = accumulated(x[0], x[1], x[2]); }                              \
  KERNEL sgd_direction_##suffix(const T* k, const T* x, T* out) { *out = sgd_direction<true>(sgd_of(k), x[0], x[1]); }   \
  KERNEL sgd_momentum_##suffix(const T* k, const T* x, T* out) { *out = sgd_momentum(sgd_of(k), x[0], x[1]); }           \
  KERNEL sgd_weight_##suffix(const T* k, const T* x, T* out) { *out = sgd_weight<true>(sgd_of(k), x[0], x[1], x[2]); }   \
  KERNEL adam_direction_##suffix(const T* k, const T* x, T* out) { *out = adam_direction<true>(adam_of(k), x[0], x[1]); } \
  KERNEL adam_##suffix(const T* k, const T* x, T* out) {                                                                 \
    const AdamState<T> s = adam<true>(adam_of(k), AdamState<T>{x[0], x[1], x[2], x[3]}, x[4]);                           \
    out[0] = s.w, out[1] = s.exp_avg, out[2] = s.exp_avg_sq, out[3] = s.max_exp_avg_sq;                                  \
  }
FOR_BOTH(float, f32)
FOR_BOTH(double, f64)

KERNEL product_f64(const double* x, double* out) {
  const DoubleDouble p = product({x[0], x[1]}, {x[2], x[3]});
  out[0] = p.high, out[1] = p.low;
}
KERNEL perturbation_f64(const double* h, const double* x, double* out) { *out = perturbation(h, x[0], x[1], true).c; }
KERNEL add_square_f64(const double* x, double* out) {
  SumOfSquares sum{out[0], out[1], out[2]};
  add_square(sum, x[0]);
  out[0] = sum.small, out[1] = sum.middle, out[2] = sum.big;
}
KERNEL from_float16(const uint16_t* x, float* out) { *out = sam_fused::from_float16(*x); }
KERNEL to_float16(const float* x, uint16_t* out) { *out = sam_fused::to_float16(*x); }
KERNEL to_bfloat16(const float* x, uint16_t* out) { *out = sam_fused::to_bfloat16(*x); }
