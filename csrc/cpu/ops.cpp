#include "cpu/ops.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/launch.h"

namespace sam_fused::cpu {
namespace {

using torch::headeronly::ScalarType;

DType code_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, "sam_fused: expected float32, float64, bfloat16 or float16");
  }
}

// Rows built from lists. A role that an operation has no list for stays null and is never read.
class RowList {
 public:
  explicit RowList(const Tensors& sizes) : rows_(sizes.size()) {
    for (size_t i = 0; i < sizes.size(); ++i) rows_[i] = TensorRow{sizes[i].numel(), 0, 0, 0, 0, {}};
  }

  RowList& role(Role role, const Tensors& tensors) {
    if (tensors.empty()) return *this;
    STD_TORCH_CHECK(tensors.size() == rows_.size(), "sam_fused: expected lists of one length, got ", tensors.size(), " and ",
                    rows_.size());
    for (size_t i = 0; i < rows_.size(); ++i) {
      rows_[i].address[role] = tensors[i].data_ptr();
      rows_[i].set_dtype(role, code_of(tensors[i]));
    }
    return *this;
  }

  RowList& ints(int64_t TensorRow::*field, const Ints& values) {
    for (size_t i = 0; i < values.size() && i < rows_.size(); ++i) rows_[i].*field = values[i];
    return *this;
  }

  Rows rows() { return {rows_.data(), static_cast<int64_t>(rows_.size())}; }

 private:
  std::vector<TensorRow> rows_;
};

Rows rows_of(const Tensor& table) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == kRowWords && table.is_contiguous() &&
                      table.scalar_type() == ScalarType::Long,
                  "sam_fused: expected an int64 table of rows as ops/prepared.py builds it");
  return {static_cast<TensorRow*>(table.data_ptr()), table.size(0)};
}

Rows rows_of(const Tensor& table, const Tensor& grads) {
  const Rows rows = rows_of(table);
  STD_TORCH_CHECK(grads.numel() == rows.count && grads.scalar_type() == ScalarType::Long && grads.is_contiguous(),
                  "sam_fused: expected one int64 gradient address per row");
  const auto* addresses = static_cast<const int64_t*>(grads.data_ptr());
  for (int64_t i = 0; i < rows.count; ++i) rows.data[i].address[kGrad] = reinterpret_cast<void*>(addresses[i]);
  return rows;
}

double value_of(const Tensor& scalar) {
  const ScalarType dtype = scalar.scalar_type();
  STD_TORCH_CHECK(scalar.numel() == 1 && (dtype == ScalarType::Double || dtype == ScalarType::Float),
                  "sam_fused: expected a float32 or float64 tensor of one element, got ", scalar.numel(), " elements");
  return dtype == ScalarType::Double ? *static_cast<const double*>(scalar.data_ptr())
                                                    : *static_cast<const float*>(scalar.data_ptr());
}

double value_or(const MaybeTensor& scalar, double otherwise) { return scalar ? value_of(*scalar) : otherwise; }

void set_value(const Tensor& scalar, double value) {
  if (scalar.scalar_type() == ScalarType::Double) *static_cast<double*>(scalar.data_ptr()) = value;
  else *static_cast<float*>(scalar.data_ptr()) = static_cast<float>(value);
}

// The norm as it is stored, and 1 where that is not a finite number.
void set_norm(const Tensor& norm, const Tensor& found_inf, double value) {
  set_value(norm, value);
  set_value(found_inf, std::isfinite(value_of(norm)) ? 0 : 1);
}

void set_perturbed(const Tensor& perturbed, int64_t value) { *static_cast<int64_t*>(perturbed.data_ptr()) = value; }

const double* table_of(const Tensor& hyper, int64_t columns) {
  STD_TORCH_CHECK(hyper.dim() == 2 && hyper.size(1) == columns && hyper.is_contiguous() &&
                      hyper.scalar_type() == ScalarType::Double,
                  "sam_fused: expected a contiguous float64 hyper-parameter table with ", columns, " columns");
  return static_cast<const double*>(hyper.data_ptr());
}

void check_not_accumulating(const Tensors& accumulators, const MaybeTensor& weight) {
  STD_TORCH_CHECK(accumulators.empty() && !weight.has_value(), "sam_fused: accumulators are not supported yet");
}

GradPolicy policy_of(const MaybeTensor& inv_scale, const MaybeTensor& found_inf, const MaybeTensor& clip) {
  GradPolicy policy;
  policy.factor = value_or(inv_scale, 1) * value_or(clip, 1);
  policy.has_factor = inv_scale.has_value() || clip.has_value();
  policy.found_inf = value_or(found_inf, 0) != 0;
  return policy;
}

Tensor new_scalar(const Tensor& like, ScalarType dtype) {
  return torch::stable::new_empty(like, std::vector<int64_t>{}, dtype);
}

}  // namespace

std::tuple<Tensor, Tensor> grad_norm(Tensors grads, Tensors params, Ints scaling, Tensors accumulators, MaybeTensor weight,
                                     MaybeTensor inv_scale) {
  check_not_accumulating(accumulators, weight);
  bool wide = false;
  for (const Tensor& grad : grads) wide = wide || grad.scalar_type() == ScalarType::Double;
  RowList list(grads);
  list.role(kGrad, grads).role(kWeight, params).ints(&TensorRow::scaling, scaling);
  Tensor norm = new_scalar(grads.at(0), wide ? ScalarType::Double : ScalarType::Float);
  Tensor found_inf = new_scalar(grads.at(0), ScalarType::Float);
  set_norm(norm, found_inf, grad_norm(list.rows(), value_or(inv_scale, 1)));
  return {norm, found_inf};
}

void perturb_(Tensors params, Tensors backups, Tensors grads, Tensor norm, Tensor hyper, Ints groups, Ints scaling,
              bool backup_exists, MaybeTensor inv_scale) {
  RowList list(params);
  list.role(kWeight, params).role(kBackup, backups).role(kGrad, grads);
  list.ints(&TensorRow::group, groups).ints(&TensorRow::scaling, scaling);
  perturb(list.rows(), value_of(norm), table_of(hyper, kPerturbColumns), value_or(inv_scale, 1), backup_exists);
}

void restore_(Tensors params, Tensors backups) {
  RowList list(params);
  list.role(kWeight, params).role(kBackup, backups);
  restore(list.rows());
}

void restore_sgd_(Tensors params, Tensors backups, Tensors grads, Tensors momentum_buffers, Tensor hyper, Ints groups,
                  Ints first, Tensors accumulators, MaybeTensor weight, MaybeTensor inv_scale, MaybeTensor found_inf,
                  MaybeTensor clip) {
  check_not_accumulating(accumulators, weight);
  RowList list(params);
  list.role(kWeight, params).role(kBackup, backups).role(kGrad, grads).role(kState0, momentum_buffers);
  list.ints(&TensorRow::group, groups).ints(&TensorRow::first, first);
  restore_sgd(list.rows(), table_of(hyper, kSgdColumns), policy_of(inv_scale, found_inf, clip));
}

void restore_adamw_(Tensors params, Tensors backups, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                    Tensors max_exp_avg_sqs, Tensors steps, Tensor hyper, Ints groups, Tensors accumulators,
                    MaybeTensor weight, MaybeTensor inv_scale, MaybeTensor found_inf, MaybeTensor clip) {
  check_not_accumulating(accumulators, weight);
  RowList list(params);
  list.role(kWeight, params).role(kBackup, backups).role(kGrad, grads);
  list.role(kState0, exp_avgs).role(kState1, exp_avg_sqs).role(kState2, max_exp_avg_sqs).role(kStep, steps);
  list.ints(&TensorRow::group, groups);
  restore_adamw(list.rows(), table_of(hyper, kAdamColumns), policy_of(inv_scale, found_inf, clip));
}

void prepared_grad_norm_(Tensor rows, Tensor grads, Tensor norm, Tensor found_inf, MaybeTensor inv_scale) {
  set_norm(norm, found_inf, grad_norm(rows_of(rows, grads), value_or(inv_scale, 1)));
}

void prepared_perturb_(Tensor rows, Tensor grads, Tensor norm, Tensor hyper, Tensor perturbed, bool backup_exists,
                       MaybeTensor inv_scale) {
  perturb(rows_of(rows, grads), value_of(norm), table_of(hyper, kPerturbColumns), value_or(inv_scale, 1), backup_exists);
  set_perturbed(perturbed, 1);
}

void prepared_restore_(Tensor rows, Tensor perturbed) {
  restore(rows_of(rows));
  set_perturbed(perturbed, 0);
}

void prepared_restore_sgd_(Tensor rows, Tensor grads, Tensor hyper, Tensor perturbed, MaybeTensor inv_scale,
                           MaybeTensor found_inf, MaybeTensor clip) {
  restore_sgd(rows_of(rows, grads), table_of(hyper, kSgdColumns), policy_of(inv_scale, found_inf, clip));
  set_perturbed(perturbed, 0);
}

void prepared_restore_adamw_(Tensor rows, Tensor grads, Tensor hyper, Tensor perturbed, MaybeTensor inv_scale,
                             MaybeTensor found_inf, MaybeTensor clip) {
  restore_adamw(rows_of(rows, grads), table_of(hyper, kAdamColumns), policy_of(inv_scale, found_inf, clip));
  set_perturbed(perturbed, 0);
}

int64_t cpu_capability() {
  const char* name = kernels().name;
  return std::strcmp(name, "avx512") == 0 ? 2 : std::strcmp(name, "avx2") == 0 ? 1 : 0;
}

int64_t row_words() { return kRowWords; }

}  // namespace sam_fused::cpu
