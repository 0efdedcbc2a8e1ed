// The CUDA forms of the operations declared in sam_fused/ops/schema.py, see cpu/ops.h. Everything runs on the current stream of
// the tensors' device and nothing here waits for it.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>

#include "operands.h"

namespace sam_fused::cuda {

#include "declarations.inl"

// The device table of rows (an int64 tensor, see TableLayout in cuda/run.h) on the device of `like`.
Tensor device_table(Tensor rows, Tensor like);

std::string cuda_architectures();  // what the kernels were compiled for, as TORCH_CUDA_ARCH_LIST spells it

}  // namespace sam_fused::cuda
