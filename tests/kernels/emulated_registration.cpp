// The CUDA operations, compiled for the CPU over fibers, as a backend called "emulated" on CPU tensors. For tests.
#include <torch/csrc/stable/library.h>

#include "cuda/ops.h"

using namespace sam_fused;

STABLE_TORCH_LIBRARY_IMPL(sam_fused, CPU, m) {
  m.impl("grad_norm.emulated", TORCH_BOX(&cuda::grad_norm));
  m.impl("perturb_.emulated", TORCH_BOX(&cuda::perturb_));
  m.impl("restore_.emulated", TORCH_BOX(&cuda::restore_));
  m.impl("restore_accumulate_.emulated", TORCH_BOX(&cuda::restore_accumulate_));
  m.impl("restore_sgd_.emulated", TORCH_BOX(&cuda::restore_sgd_));
  m.impl("restore_adamw_.emulated", TORCH_BOX(&cuda::restore_adamw_));
  m.impl("emulated_prepared_grad_norm_", TORCH_BOX(&cuda::prepared_grad_norm_));
  m.impl("emulated_prepared_perturb_", TORCH_BOX(&cuda::prepared_perturb_));
  m.impl("emulated_prepared_restore_", TORCH_BOX(&cuda::prepared_restore_));
  m.impl("emulated_prepared_restore_accumulate_", TORCH_BOX(&cuda::prepared_restore_accumulate_));
  m.impl("emulated_prepared_restore_sgd_", TORCH_BOX(&cuda::prepared_restore_sgd_));
  m.impl("emulated_prepared_restore_adamw_", TORCH_BOX(&cuda::prepared_restore_adamw_));
  m.impl("emulated_device_table", TORCH_BOX(&cuda::device_table));
}
