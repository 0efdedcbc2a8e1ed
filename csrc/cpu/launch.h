// The operations on the CPU: plan, parallel region, kernels. The only CPU code that opens a parallel region.
#pragma once

#include <cstdint>

#include "plan.h"

namespace sam_fused::cpu {

// What the base optimizer's gradient is multiplied with, and whether the step is skipped.
struct GradPolicy {
  double factor = 1;  // inv_scale times the clip factor
  double weight = 1;  // of the last micro-batch, where there are accumulators
  bool found_inf = false;
};

double grad_norm(Rows rows, double weight, double inv_scale);
void perturb(Rows rows, double norm, const double* hyper, double inv_scale, bool backup_exists);
void restore(Rows rows);
void restore_accumulate(Rows rows, double weight, bool fresh);
void restore_sgd(Rows rows, const double* hyper, const GradPolicy& policy);
void restore_adamw(Rows rows, const double* hyper, const GradPolicy& policy);

}  // namespace sam_fused::cpu
