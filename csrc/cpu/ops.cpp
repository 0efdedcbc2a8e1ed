#include "cpu/ops.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "hyper.h"

namespace sam_fused::cpu {
namespace {

using torch::headeronly::ScalarType;

double value_of(const Tensor& scalar) {
  check_scalar(scalar, Place::cpu());
  return scalar.scalar_type() == ScalarType::Double ? *static_cast<const double*>(scalar.data_ptr())
                                                    : *static_cast<const float*>(scalar.data_ptr());
}

double value_or(const MaybeTensor& scalar, double otherwise) { return scalar ? value_of(*scalar) : otherwise; }

void set_value(const Tensor& scalar, double value) {
  check_scalar(scalar, Place::cpu());
  if (scalar.scalar_type() == ScalarType::Double) *static_cast<double*>(scalar.data_ptr()) = value;
  else *static_cast<float*>(scalar.data_ptr()) = static_cast<float>(value);
}

// The norm as it is stored, and 1 where that is not a finite number.
void set_norm(const Tensor& norm, const Tensor& found_inf, double value) {
  set_value(norm, value);
  set_value(found_inf, std::isfinite(value_of(norm)) ? 0 : 1);
}

const double* table_of(const Tensor& hyper, int64_t columns, Rows rows) {
  STD_TORCH_CHECK(hyper.is_cpu(), "sam_fused: expected the hyper-parameter table on the CPU as the parameters");
  check_table(hyper, columns, rows);
  return static_cast<const double*>(hyper.data_ptr());
}

// The weight of a micro-batch; 1, and ignored, where the rows have no accumulators.
double weight_of(Rows rows, Role deciding, const MaybeTensor& weight) {
  check_accumulators(rows, deciding, weight);
  return value_or(weight, 1);
}

GradPolicy policy_of(Rows rows, const MaybeTensor& weight, const MaybeTensor& inv_scale, const MaybeTensor& found_inf,
                     const MaybeTensor& clip) {
  GradPolicy policy;
  policy.weight = weight_of(rows, kWeight, weight);
  policy.factor = value_or(inv_scale, 1) * value_or(clip, 1);
  policy.found_inf = value_or(found_inf, 0) != 0;
  return policy;
}

}  // namespace

std::tuple<Tensor, Tensor> grad_norm(Tensors grads, Tensors params, Ints scaling, Tensors accumulators, MaybeTensor weight,
                                     MaybeTensor inv_scale) {
  RowList list = norm_rows(grads, params, scaling, accumulators, Place::cpu());
  Tensor norm = new_scalar(grads.at(0), norm_dtype(grads));
  Tensor found_inf = new_scalar(grads.at(0), ScalarType::Float);
  set_norm(norm, found_inf, grad_norm(list.rows(), weight_of(list.rows(), kGrad, weight), value_or(inv_scale, 1)));
  return {norm, found_inf};
}

void perturb_(Tensors params, Tensors backups, Tensors grads, Tensor norm, Tensor hyper, Ints groups, Ints scaling,
              bool backup_exists, MaybeTensor inv_scale) {
  RowList list = perturb_rows(params, backups, grads, groups, scaling, Place::cpu());
  const double* table = table_of(hyper, kPerturbColumns, list.rows());
  perturb(list.rows(), value_of(norm), table, value_or(inv_scale, 1), backup_exists);
}

void restore_(Tensors params, Tensors backups) {
  restore(restore_rows(params, backups, Place::cpu()).rows());
}

void restore_accumulate_(Tensors params, Tensors backups, Tensors grads, Tensors accumulators, Tensor weight, bool fresh) {
  RowList list = accumulate_rows(params, backups, grads, accumulators, Place::cpu());
  restore_accumulate(list.rows(), weight_of(list.rows(), kWeight, weight), fresh);
}

void restore_sgd_(Tensors params, Tensors backups, Tensors grads, Tensors momentum_buffers, Tensor hyper, Ints groups,
                  Ints first, Tensors accumulators, MaybeTensor weight, MaybeTensor inv_scale, MaybeTensor found_inf,
                  MaybeTensor clip) {
  RowList list = sgd_rows(params, backups, grads, momentum_buffers, groups, first, accumulators, Place::cpu());
  const Rows rows = list.rows();
  const double* table = table_of(hyper, kSgdColumns, rows);
  check_state(rows, table, kSgdColumns, kMomentum, kState0);
  restore_sgd(rows, table, policy_of(rows, weight, inv_scale, found_inf, clip));
}

void restore_adamw_(Tensors params, Tensors backups, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                    Tensors max_exp_avg_sqs, Tensors steps, Tensor hyper, Ints groups, Tensors accumulators,
                    MaybeTensor weight, MaybeTensor inv_scale, MaybeTensor found_inf, MaybeTensor clip) {
  RowList list =
      adamw_rows(params, backups, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, groups, accumulators, Place::cpu());
  const Rows rows = list.rows();
  const double* table = table_of(hyper, kAdamColumns, rows);
  check_state(rows, table, kAdamColumns, kAmsgrad, kState2);
  restore_adamw(rows, table, policy_of(rows, weight, inv_scale, found_inf, clip));
}

void prepared_grad_norm_(Tensor rows, Tensor grads, Tensor norm, Tensor found_inf, MaybeTensor weight, MaybeTensor inv_scale,
                         MaybeTensor overflows, MaybeTensor) {
  const Rows all = rows_of(rows, grads);
  int64_t* count = overflows.has_value() ? cell_of(*overflows) : nullptr;
  set_norm(norm, found_inf, grad_norm(all, weight_of(all, kGrad, weight), value_or(inv_scale, 1)));
  if (count != nullptr && value_of(found_inf) != 0) ++*count;
}

void prepared_perturb_(Tensor rows, Tensor grads, Tensor norm, Tensor hyper, Tensor perturbed, bool backup_exists,
                       MaybeTensor inv_scale, MaybeTensor) {
  const Rows all = rows_of(rows, grads);
  int64_t* cell = cell_of(perturbed);
  perturb(all, value_of(norm), table_of(hyper, kPerturbColumns, all), value_or(inv_scale, 1), backup_exists);
  *cell = 1;
}

void prepared_restore_(Tensor rows, Tensor perturbed, MaybeTensor) {
  int64_t* cell = cell_of(perturbed);
  restore(rows_of(rows));
  *cell = 0;
}

void prepared_restore_accumulate_(Tensor rows, Tensor grads, Tensor weight, Tensor perturbed, bool fresh, MaybeTensor) {
  const Rows all = rows_of(rows, grads);
  const double share = weight_of(all, kWeight, weight);
  int64_t* cell = cell_of(perturbed);
  restore_accumulate(all, share, fresh);
  *cell = 0;
}

void prepared_restore_sgd_(Tensor rows, Tensor grads, Tensor hyper, Tensor perturbed, MaybeTensor weight,
                           MaybeTensor inv_scale, MaybeTensor found_inf, MaybeTensor clip, MaybeTensor) {
  const Rows all = rows_of(rows, grads);
  const double* table = table_of(hyper, kSgdColumns, all);
  check_state(all, table, kSgdColumns, kMomentum, kState0);
  int64_t* cell = cell_of(perturbed);
  restore_sgd(all, table, policy_of(all, weight, inv_scale, found_inf, clip));
  *cell = 0;
}

void prepared_restore_adamw_(Tensor rows, Tensor grads, Tensor hyper, Tensor perturbed, MaybeTensor weight,
                             MaybeTensor inv_scale, MaybeTensor found_inf, MaybeTensor clip, MaybeTensor) {
  const Rows all = rows_of(rows, grads);
  const double* table = table_of(hyper, kAdamColumns, all);
  check_state(all, table, kAdamColumns, kAmsgrad, kState2);
  int64_t* cell = cell_of(perturbed);
  restore_adamw(all, table, policy_of(all, weight, inv_scale, found_inf, clip));
  *cell = 0;
}

int64_t cpu_capability() {
  const char* name = kernels().name;
  return std::strcmp(name, "avx512") == 0 ? 2 : std::strcmp(name, "avx2") == 0 ? 1 : 0;
}

int64_t row_words() { return kRowWords; }

}  // namespace sam_fused::cpu
