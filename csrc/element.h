// The arithmetic of one element, on registers: no loads, no stores, no dtype conversions. One file for g++ and nvcc.
//
// T is the arithmetic's type: float, or double for fp64 storage. Every multiply-add that is one rounding is written fma();
// contraction is off in every compiler, so these lines are the one definition of the bits. Constants come in as T, rounded
// once from fp64 by the caller.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SAM_FUSED_HD __host__ __device__ __forceinline__
#else
#define SAM_FUSED_HD inline __attribute__((always_inline))
#endif

namespace sam_fused {

SAM_FUSED_HD float fused_multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
SAM_FUSED_HD double fused_multiply_add(double a, double b, double c) { return ::fma(a, b, c); }
SAM_FUSED_HD float square_root(float x) { return ::sqrtf(x); }
SAM_FUSED_HD double square_root(double x) { return ::sqrt(x); }

// False for NaN too.
SAM_FUSED_HD bool is_finite(double x) { return x - x == 0; }

struct DoubleDouble {
  double high, low;
};

// The product to about 2^-104, whatever a machine's pow() would have made of it.
SAM_FUSED_HD DoubleDouble product(DoubleDouble a, DoubleDouble b) {
  const double p = a.high * b.high;
  double e = fused_multiply_add(a.high, b.high, -p);
  e = e + (a.high * b.low + a.low * b.high);
  const double high = p + e;
  return {high, e - (high - p)};
}

// base^exponent for a whole exponent >= 0. Not pow(): hosts and devices have different ones, and Adam's bias corrections would
// differ with them. In double-double because the error of base^n doubles with each squaring.
SAM_FUSED_HD double power(double base, double exponent) {
  DoubleDouble result{1, 0}, square{base, 0};
  for (uint64_t bits = static_cast<uint64_t>(exponent); bits != 0; bits >>= 1) {
    if (bits & 1) result = product(result, square);
    square = product(square, square);
  }
  return result.high;
}

// w + c g; with T = |w|: w + c w (w g). w (w g) and not (w w) g, so that the norm's w g is the same product.
template <class T>
SAM_FUSED_HD T perturbed(T w, T g, T c) {
  return fused_multiply_add(c, g, w);
}
template <class T>
SAM_FUSED_HD T perturbed_adaptive(T w, T g, T c) {
  return fused_multiply_add(c, w * (w * g), w);
}

// The gradient of several micro-batches: what was accumulated plus the weight of this one times its gradient.
template <class T>
SAM_FUSED_HD T accumulated(T sum, T g, T weight) {
  return fused_multiply_add(weight, g, sum);
}

// What is optional in a base step is a template parameter: a condition inside the loops would keep them from being vectorised.
// Two things need none, because multiplying by 1 changes no value: grad_factor (inv_scale times the clip factor, negative when
// maximizing) and Adam's decay_factor.

// SGD [torch.optim.SGD]: d = g + wd w; v = mom v + (1 - damp) d, or v = d when the buffer is created; w -= lr (d + mom v | v).
template <class T>
struct SgdConstants {
  T negative_lr, momentum, one_minus_dampening, weight_decay, grad_factor;
  bool has_momentum, has_weight_decay, nesterov;
};

template <bool kWeightDecay, class T>
SAM_FUSED_HD T sgd_direction(const SgdConstants<T>& k, T w, T g) {
  g = g * k.grad_factor;
  if constexpr (kWeightDecay) g = fused_multiply_add(k.weight_decay, w, g);
  return g;
}
template <class T>
SAM_FUSED_HD T sgd_momentum(const SgdConstants<T>& k, T d, T v) {
  return fused_multiply_add(k.one_minus_dampening, d, k.momentum * v);
}
// v is the new momentum, or d where there is none.
template <bool kNesterov, class T>
SAM_FUSED_HD T sgd_weight(const SgdConstants<T>& k, T w, T d, T v) {
  if constexpr (kNesterov) v = fused_multiply_add(k.momentum, v, d);
  return fused_multiply_add(k.negative_lr, v, w);
}

// Adam and AdamW [torch.optim.Adam, 1412.6980, 1711.05101], in the order of torch's single-tensor form. step_size is
// lr / (1 - beta1^t) and bias2_sqrt is sqrt(1 - beta2^t), both computed in fp64 and rounded once; decay_factor is 1 - lr wd
// for AdamW, else 1.
template <class T>
struct AdamConstants {
  T one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, decay_factor, negative_step_size, bias2_sqrt, grad_factor;
  bool coupled_weight_decay, amsgrad;
};

template <class T>
struct AdamState {
  T w, exp_avg, exp_avg_sq, max_exp_avg_sq;
};

template <bool kCoupledWeightDecay, class T>
SAM_FUSED_HD T adam_direction(const AdamConstants<T>& k, T w, T g) {
  g = g * k.grad_factor;
  if constexpr (kCoupledWeightDecay) g = fused_multiply_add(k.weight_decay, w, g);
  return g;
}
template <bool kAmsgrad, class T>
SAM_FUSED_HD AdamState<T> adam(const AdamConstants<T>& k, AdamState<T> s, T g) {
  s.w = s.w * k.decay_factor;
  s.exp_avg = fused_multiply_add(k.one_minus_beta1, g - s.exp_avg, s.exp_avg);
  s.exp_avg_sq = fused_multiply_add(k.one_minus_beta2 * g, g, k.beta2 * s.exp_avg_sq);
  T second = s.exp_avg_sq;
  if constexpr (kAmsgrad) {
    // Written so that a NaN on either side stays a NaN, as torch.maximum does.
    s.max_exp_avg_sq = second > s.max_exp_avg_sq || second != second ? second : s.max_exp_avg_sq;
    second = s.max_exp_avg_sq;
  }
  const T denominator = square_root(second) / k.bias2_sqrt + k.eps;
  s.w = s.w + k.negative_step_size * s.exp_avg / denominator;
  return s;
}

}  // namespace sam_fused
