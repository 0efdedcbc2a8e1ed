// The CUDA forms of the operations declared in sam_fused/ops/schema.py, see cpu/ops.h. Everything runs on the current stream of
// the tensors' device and nothing here waits for it.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>

#include "operands.h"

namespace sam_fused::cuda {

std::tuple<Tensor, Tensor> grad_norm(Tensors grads, Tensors params, Ints scaling, Tensors accumulators, MaybeTensor weight,
                                     MaybeTensor inv_scale);
void perturb_(Tensors params, Tensors backups, Tensors grads, Tensor norm, Tensor hyper, Ints groups, Ints scaling,
              bool backup_exists, MaybeTensor inv_scale);
void restore_(Tensors params, Tensors backups);
void restore_sgd_(Tensors params, Tensors backups, Tensors grads, Tensors momentum_buffers, Tensor hyper, Ints groups,
                  Ints first, Tensors accumulators, MaybeTensor weight, MaybeTensor inv_scale, MaybeTensor found_inf,
                  MaybeTensor clip);
void restore_adamw_(Tensors params, Tensors backups, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                    Tensors max_exp_avg_sqs, Tensors steps, Tensor hyper, Ints groups, Tensors accumulators,
                    MaybeTensor weight, MaybeTensor inv_scale, MaybeTensor found_inf, MaybeTensor clip);

// `table` is what device_table made of `rows`, on the parameters' device.
void prepared_grad_norm_(Tensor rows, Tensor grads, Tensor norm, Tensor found_inf, MaybeTensor inv_scale, MaybeTensor table);
void prepared_perturb_(Tensor rows, Tensor grads, Tensor norm, Tensor hyper, Tensor perturbed, bool backup_exists,
                       MaybeTensor inv_scale, MaybeTensor table);
void prepared_restore_(Tensor rows, Tensor perturbed, MaybeTensor table);
void prepared_restore_sgd_(Tensor rows, Tensor grads, Tensor hyper, Tensor perturbed, MaybeTensor inv_scale,
                           MaybeTensor found_inf, MaybeTensor clip, MaybeTensor table);
void prepared_restore_adamw_(Tensor rows, Tensor grads, Tensor hyper, Tensor perturbed, MaybeTensor inv_scale,
                             MaybeTensor found_inf, MaybeTensor clip, MaybeTensor table);

// The device table of rows (an int64 tensor, see TableLayout in cuda/run.h) on the device of `like`.
Tensor device_table(Tensor rows, Tensor like);

std::string cuda_architectures();  // what the kernels were compiled for, as TORCH_CUDA_ARCH_LIST spells it

}  // namespace sam_fused::cuda
