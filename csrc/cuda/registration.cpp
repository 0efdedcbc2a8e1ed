// Every CUDA op's binding to its dispatch key, nothing else: see csrc/registration.cpp. A library of its own, because it needs
// a torch with CUDA to load and the CPU's must not.
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include "cuda/ops.h"

using namespace sam_fused;

STABLE_TORCH_LIBRARY_IMPL(sam_fused, CUDA, m) {
  m.impl("grad_norm.native", TORCH_BOX(&cuda::grad_norm));
  m.impl("perturb_.native", TORCH_BOX(&cuda::perturb_));
  m.impl("restore_.native", TORCH_BOX(&cuda::restore_));
  m.impl("restore_accumulate_.native", TORCH_BOX(&cuda::restore_accumulate_));
  m.impl("restore_sgd_.native", TORCH_BOX(&cuda::restore_sgd_));
  m.impl("restore_adamw_.native", TORCH_BOX(&cuda::restore_adamw_));
  m.impl("prepared_grad_norm_", TORCH_BOX(&cuda::prepared_grad_norm_));
  m.impl("prepared_perturb_", TORCH_BOX(&cuda::prepared_perturb_));
  m.impl("prepared_restore_", TORCH_BOX(&cuda::prepared_restore_));
  m.impl("prepared_restore_accumulate_", TORCH_BOX(&cuda::prepared_restore_accumulate_));
  m.impl("prepared_restore_sgd_", TORCH_BOX(&cuda::prepared_restore_sgd_));
  m.impl("prepared_restore_adamw_", TORCH_BOX(&cuda::prepared_restore_adamw_));
  m.impl("device_table", TORCH_BOX(&cuda::device_table));
}

STABLE_TORCH_LIBRARY_IMPL(sam_fused, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&cuda::cuda_architectures));
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
