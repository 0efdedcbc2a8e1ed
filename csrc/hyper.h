// From rows of the hyper-parameter tables to the constants of element.h, in fp64. One file for g++ and nvcc: the CPU computes
// them before its loops, a GPU block before its own.
#pragma once

#include <cmath>
#include <cstdint>

#include "element.h"

namespace sam_fused {

// Columns of the fp64 hyper-parameter tables, one row per parameter group. ops/schema.py names them in the same order.
enum PerturbColumn { kRho, kPerturbEps, kPerturbColumns };
enum SgdColumn { kSgdLr, kMomentum, kDampening, kSgdWeightDecay, kNesterov, kSgdMaximize, kSgdColumns };
enum AdamColumn { kAdamLr, kBeta1, kBeta2, kAdamEps, kAdamWeightDecay, kDecoupled, kAmsgrad, kAdamMaximize, kAdamColumns };

// What a perturbation does to one tensor. `move` false: nothing moves, the backup is still written. A branch and not a product
// with zero, because fma(0, inf, w) is NaN.
struct Perturbation {
  double c;  // rho / (norm + perturb_eps) * inv_scale, rounded once to the arithmetic's type
  bool move;
};

SAM_FUSED_HD Perturbation perturbation(const double* h, double norm, double inv_scale, bool wide) {
  const double exact = h[kRho] / (norm + h[kPerturbEps]) * inv_scale;
  const double c = wide ? exact : static_cast<double>(static_cast<float>(exact));
  return {c, is_finite(norm) && norm != 0 && c != 0 && is_finite(c)};
}

// grad_factor: inv_scale times the clip factor.
SAM_FUSED_HD SgdConstants<double> sgd_constants(const double* h, double grad_factor) {
  return {-h[kSgdLr],
          h[kMomentum],
          1 - h[kDampening],
          h[kSgdWeightDecay],
          h[kSgdMaximize] != 0 ? -grad_factor : grad_factor,
          h[kMomentum] != 0,
          h[kSgdWeightDecay] != 0,
          h[kNesterov] != 0};
}

// power1 and power2: beta1 and beta2 to the number of the step that is taken.
SAM_FUSED_HD AdamConstants<double> adam_constants(const double* h, double power1, double power2, double grad_factor) {
  const bool decoupled = h[kDecoupled] != 0;
  return {1 - h[kBeta1],
          h[kBeta2],
          1 - h[kBeta2],
          h[kAdamEps],
          h[kAdamWeightDecay],
          decoupled ? 1 - h[kAdamLr] * h[kAdamWeightDecay] : 1,
          -h[kAdamLr] / (1 - power1),
          ::sqrt(1 - power2),
          h[kAdamMaximize] != 0 ? -grad_factor : grad_factor,
          h[kAdamWeightDecay] != 0 && !decoupled,
          h[kAmsgrad] != 0};
}

template <class T>
SAM_FUSED_HD SgdConstants<T> rounded(const SgdConstants<double>& k) {
  return {static_cast<T>(k.negative_lr),
          static_cast<T>(k.momentum),
          static_cast<T>(k.one_minus_dampening),
          static_cast<T>(k.weight_decay),
          static_cast<T>(k.grad_factor),
          k.has_momentum,
          k.has_weight_decay,
          k.nesterov};
}

template <class T>
SAM_FUSED_HD AdamConstants<T> rounded(const AdamConstants<double>& k) {
  return {static_cast<T>(k.one_minus_beta1),
          static_cast<T>(k.beta2),
          static_cast<T>(k.one_minus_beta2),
          static_cast<T>(k.eps),
          static_cast<T>(k.weight_decay),
          static_cast<T>(k.decay_factor),
          static_cast<T>(k.negative_step_size),
          static_cast<T>(k.bias2_sqrt),
          static_cast<T>(k.grad_factor),
          k.coupled_weight_decay,
          k.amsgrad};
}

}  // namespace sam_fused
