// The forms of the operations declared in sam_fused/ops/schema.py that every device has: list ops (door 1) and prepared ops
// (door 2). Included by each device's ops.h inside its namespace.

std::tuple<Tensor, Tensor> grad_norm(Tensors grads, Tensors params, Ints scaling, Tensors accumulators, MaybeTensor weight,
                                     MaybeTensor inv_scale);
void perturb_(Tensors params, Tensors backups, Tensors grads, Tensor norm, Tensor hyper, Ints groups, Ints scaling,
              bool backup_exists, MaybeTensor inv_scale);
void restore_(Tensors params, Tensors backups);
void restore_accumulate_(Tensors params, Tensors backups, Tensors grads, Tensors accumulators, Tensor weight, bool fresh);
void restore_sgd_(Tensors params, Tensors backups, Tensors grads, Tensors momentum_buffers, Tensor hyper, Ints groups,
                  Ints first, Tensors accumulators, MaybeTensor weight, MaybeTensor inv_scale, MaybeTensor found_inf,
                  MaybeTensor clip);
void restore_adamw_(Tensors params, Tensors backups, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                    Tensors max_exp_avg_sqs, Tensors steps, Tensor hyper, Ints groups, Tensors accumulators,
                    MaybeTensor weight, MaybeTensor inv_scale, MaybeTensor found_inf, MaybeTensor clip);

// rows: int64 [n, kRowWords], see TensorRow. grads: int64 [n], the gradients' addresses. perturbed: int64 [1], set to 1 in
// the same call that moves the weights and to 0 in the one that moves them back, so no interrupt can fall between the two.
// table: what device_table made of `rows`, on the parameters' device; the CPU reads `rows` itself and ignores it.
// weight: there if the rows have accumulators. overflows: int64, one more where the norm is not finite.
void prepared_grad_norm_(Tensor rows, Tensor grads, Tensor norm, Tensor found_inf, MaybeTensor weight, MaybeTensor inv_scale,
                         MaybeTensor overflows, MaybeTensor table);
void prepared_perturb_(Tensor rows, Tensor grads, Tensor norm, Tensor hyper, Tensor perturbed, bool backup_exists,
                       MaybeTensor inv_scale, MaybeTensor table);
void prepared_restore_(Tensor rows, Tensor perturbed, MaybeTensor table);
void prepared_restore_accumulate_(Tensor rows, Tensor grads, Tensor weight, Tensor perturbed, bool fresh, MaybeTensor table);
void prepared_restore_sgd_(Tensor rows, Tensor grads, Tensor hyper, Tensor perturbed, MaybeTensor weight,
                           MaybeTensor inv_scale, MaybeTensor found_inf, MaybeTensor clip, MaybeTensor table);
void prepared_restore_adamw_(Tensor rows, Tensor grads, Tensor hyper, Tensor perturbed, MaybeTensor weight,
                             MaybeTensor inv_scale, MaybeTensor found_inf, MaybeTensor clip, MaybeTensor table);
