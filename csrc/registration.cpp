// Every native op's binding to its dispatch key, nothing else. The schemas are declared in sam_fused/ops/schema.py.
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

using namespace sam_fused;

STABLE_TORCH_LIBRARY_IMPL(sam_fused, CPU, m) {
  m.impl("grad_norm.native", TORCH_BOX(&cpu::grad_norm));
  m.impl("perturb_.native", TORCH_BOX(&cpu::perturb_));
  m.impl("restore_.native", TORCH_BOX(&cpu::restore_));
  m.impl("restore_accumulate_.native", TORCH_BOX(&cpu::restore_accumulate_));
  m.impl("restore_sgd_.native", TORCH_BOX(&cpu::restore_sgd_));
  m.impl("restore_adamw_.native", TORCH_BOX(&cpu::restore_adamw_));
  m.impl("prepared_grad_norm_", TORCH_BOX(&cpu::prepared_grad_norm_));
  m.impl("prepared_perturb_", TORCH_BOX(&cpu::prepared_perturb_));
  m.impl("prepared_restore_", TORCH_BOX(&cpu::prepared_restore_));
  m.impl("prepared_restore_accumulate_", TORCH_BOX(&cpu::prepared_restore_accumulate_));
  m.impl("prepared_restore_sgd_", TORCH_BOX(&cpu::prepared_restore_sgd_));
  m.impl("prepared_restore_adamw_", TORCH_BOX(&cpu::prepared_restore_adamw_));
}

STABLE_TORCH_LIBRARY_IMPL(sam_fused, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu::cpu_capability));
  m.impl("row_words", TORCH_BOX(&cpu::row_words));
}

// Importing the module is what runs the registrations above; it has no contents of its own.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
