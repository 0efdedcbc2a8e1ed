#include "cpu/ops.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

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

// Whether both fill a block of memory of their own and element i of one block is element i of the other's. A dimension of
// size 1 has no stride that matters.
bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim() || a.numel() != b.numel()) return false;
  std::vector<std::pair<int64_t, int64_t>> strides;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
    if (a.size(d) == 1) continue;
    if (a.stride(d) != b.stride(d)) return a.is_contiguous() && b.is_contiguous();
    strides.emplace_back(a.stride(d), a.size(d));
  }
  std::sort(strides.begin(), strides.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : strides) {
    if (stride != expected) return a.numel() == 0;
    expected *= size;
  }
  return true;
}

// What double and float are read from and written to.
void check_scalar(const Tensor& scalar) {
  const ScalarType dtype = scalar.scalar_type();
  STD_TORCH_CHECK(scalar.is_cpu() && scalar.numel() == 1 && (dtype == ScalarType::Double || dtype == ScalarType::Float),
                  "sam_fused: expected a float32 or float64 tensor of one element on the CPU, got ", scalar.numel(), " elements");
}

bool may_be_unused(Role role) { return role == kState0 || role == kState1 || role == kState2; }

// Rows built from lists. A role that an operation has no list for stays null and is never read. These operations can be
// called by anybody through torch.ops, so whatever could make a kernel leave a tensor's memory is checked here.
class RowList {
 public:
  explicit RowList(Tensors sizes) : sizes_(std::move(sizes)), rows_(sizes_.size()) {
    for (size_t i = 0; i < sizes_.size(); ++i) rows_[i] = TensorRow{sizes_[i].numel(), 0, 0, 0, 0, {}};
  }

  RowList& role(Role role, const Tensors& tensors) {
    if (tensors.empty()) return *this;
    check_length(tensors.size());
    for (size_t i = 0; i < rows_.size(); ++i) {
      const Tensor& tensor = tensors[i];
      STD_TORCH_CHECK(tensor.is_cpu(), "sam_fused: expected tensors on the CPU");
      if (role == kStep) {
        check_scalar(tensor);
      } else if (tensor.numel() == 0 && may_be_unused(role)) {
        continue;  // stays null: refused below where the base optimizer needs it
      } else {
        STD_TORCH_CHECK(same_layout(sizes_[i], tensor), "sam_fused: expected tensor ", i, " of every list to lie in memory as ",
                        "its parameter does");
      }
      rows_[i].address[role] = tensor.data_ptr();
      rows_[i].set_dtype(role, code_of(tensor));
    }
    return *this;
  }

  RowList& ints(int64_t TensorRow::*field, const Ints& values) {
    if (values.empty()) return *this;
    check_length(values.size());
    for (size_t i = 0; i < values.size(); ++i) rows_[i].*field = values[i];
    return *this;
  }

  // A backup is copied byte by byte.
  RowList& backups_have_the_weights_dtype() {
    for (const TensorRow& row : rows_) {
      STD_TORCH_CHECK(row.dtype(kWeight) == row.dtype(kBackup), "sam_fused: expected backups of their parameters' dtype");
    }
    return *this;
  }

  Rows rows() { return {rows_.data(), static_cast<int64_t>(rows_.size())}; }

 private:
  void check_length(size_t length) const {
    STD_TORCH_CHECK(length == rows_.size(), "sam_fused: expected lists of one length, got ", length, " and ", rows_.size());
  }

  Tensors sizes_;
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
  for (int64_t i = 0; i < rows.count; ++i) {
    STD_TORCH_CHECK(addresses[i] != 0 || rows.data[i].numel == 0, "sam_fused: expected an address for gradient ", i);
    rows.data[i].address[kGrad] = reinterpret_cast<void*>(addresses[i]);
  }
  return rows;
}

double value_of(const Tensor& scalar) {
  check_scalar(scalar);
  return scalar.scalar_type() == ScalarType::Double ? *static_cast<const double*>(scalar.data_ptr())
                                                    : *static_cast<const float*>(scalar.data_ptr());
}

double value_or(const MaybeTensor& scalar, double otherwise) { return scalar ? value_of(*scalar) : otherwise; }

void set_value(const Tensor& scalar, double value) {
  check_scalar(scalar);
  if (scalar.scalar_type() == ScalarType::Double) *static_cast<double*>(scalar.data_ptr()) = value;
  else *static_cast<float*>(scalar.data_ptr()) = static_cast<float>(value);
}

// The norm as it is stored, and 1 where that is not a finite number.
void set_norm(const Tensor& norm, const Tensor& found_inf, double value) {
  set_value(norm, value);
  set_value(found_inf, std::isfinite(value_of(norm)) ? 0 : 1);
}

// Looked up before the weights move, written after.
int64_t* cell_of(const Tensor& perturbed) {
  STD_TORCH_CHECK(perturbed.is_cpu() && perturbed.numel() == 1 && perturbed.scalar_type() == ScalarType::Long,
                  "sam_fused: expected the perturbed cell to be one int64 on the CPU");
  return static_cast<int64_t*>(perturbed.data_ptr());
}

const double* table_of(const Tensor& hyper, int64_t columns, Rows rows) {
  STD_TORCH_CHECK(hyper.dim() == 2 && hyper.size(1) == columns && hyper.is_contiguous() &&
                      hyper.scalar_type() == ScalarType::Double,
                  "sam_fused: expected a contiguous float64 hyper-parameter table with ", columns, " columns");
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t group = rows.data[i].group;
    STD_TORCH_CHECK(group >= 0 && group < hyper.size(0), "sam_fused: expected groups below ", hyper.size(0), ", got ", group);
  }
  return static_cast<const double*>(hyper.data_ptr());
}

// State that the base optimizer reads must be there for every tensor whose group asks for it.
void check_state(Rows rows, const double* hyper, int64_t columns, int64_t wanted_by, Role role) {
  for (int64_t i = 0; i < rows.count; ++i) {
    const TensorRow& row = rows.data[i];
    STD_TORCH_CHECK(row.numel == 0 || row.address[role] != nullptr || hyper[row.group * columns + wanted_by] == 0,
                    "sam_fused: expected optimizer state for tensor ", i, " because its group uses it, got none");
  }
}

void check_role(Rows rows, Role role) {
  for (int64_t i = 0; i < rows.count; ++i) {
    STD_TORCH_CHECK(rows.data[i].numel == 0 || rows.data[i].address[role] != nullptr,
                    "sam_fused: expected a list with an entry for tensor ", i, ", got none");
  }
}

void check_not_accumulating(const Tensors& accumulators, const MaybeTensor& weight) {
  STD_TORCH_CHECK(accumulators.empty() && !weight.has_value(), "sam_fused: accumulators are not supported yet");
}

GradPolicy policy_of(const MaybeTensor& inv_scale, const MaybeTensor& found_inf, const MaybeTensor& clip) {
  GradPolicy policy;
  policy.factor = value_or(inv_scale, 1) * value_or(clip, 1);
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
  for (const int64_t code : scaling) {
    STD_TORCH_CHECK(code == 0 || params.size() == grads.size(), "sam_fused: expected params because a tensor is scaled by them");
  }
  check_role(list.rows(), kGrad);
  if (!params.empty()) check_role(list.rows(), kWeight);
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
  list.backups_have_the_weights_dtype();
  const Rows rows = list.rows();
  for (const Role role : {kWeight, kBackup, kGrad}) check_role(rows, role);
  perturb(rows, value_of(norm), table_of(hyper, kPerturbColumns, rows), value_or(inv_scale, 1), backup_exists);
}

void restore_(Tensors params, Tensors backups) {
  RowList list(params);
  list.role(kWeight, params).role(kBackup, backups).backups_have_the_weights_dtype();
  for (const Role role : {kWeight, kBackup}) check_role(list.rows(), role);
  restore(list.rows());
}

void restore_sgd_(Tensors params, Tensors backups, Tensors grads, Tensors momentum_buffers, Tensor hyper, Ints groups,
                  Ints first, Tensors accumulators, MaybeTensor weight, MaybeTensor inv_scale, MaybeTensor found_inf,
                  MaybeTensor clip) {
  check_not_accumulating(accumulators, weight);
  RowList list(params);
  list.role(kWeight, params).role(kBackup, backups).role(kGrad, grads).role(kState0, momentum_buffers);
  list.ints(&TensorRow::group, groups).ints(&TensorRow::first, first);
  list.backups_have_the_weights_dtype();
  const Rows rows = list.rows();
  for (const Role role : {kWeight, kBackup, kGrad}) check_role(rows, role);
  const double* table = table_of(hyper, kSgdColumns, rows);
  check_state(rows, table, kSgdColumns, kMomentum, kState0);
  restore_sgd(rows, table, policy_of(inv_scale, found_inf, clip));
}

void restore_adamw_(Tensors params, Tensors backups, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                    Tensors max_exp_avg_sqs, Tensors steps, Tensor hyper, Ints groups, Tensors accumulators,
                    MaybeTensor weight, MaybeTensor inv_scale, MaybeTensor found_inf, MaybeTensor clip) {
  check_not_accumulating(accumulators, weight);
  RowList list(params);
  list.role(kWeight, params).role(kBackup, backups).role(kGrad, grads);
  list.role(kState0, exp_avgs).role(kState1, exp_avg_sqs).role(kState2, max_exp_avg_sqs).role(kStep, steps);
  list.ints(&TensorRow::group, groups);
  list.backups_have_the_weights_dtype();
  const Rows rows = list.rows();
  for (const Role role : {kWeight, kBackup, kGrad, kState0, kState1, kStep}) check_role(rows, role);
  const double* table = table_of(hyper, kAdamColumns, rows);
  check_state(rows, table, kAdamColumns, kAmsgrad, kState2);
  restore_adamw(rows, table, policy_of(inv_scale, found_inf, clip));
}

void prepared_grad_norm_(Tensor rows, Tensor grads, Tensor norm, Tensor found_inf, MaybeTensor inv_scale) {
  set_norm(norm, found_inf, grad_norm(rows_of(rows, grads), value_or(inv_scale, 1)));
}

void prepared_perturb_(Tensor rows, Tensor grads, Tensor norm, Tensor hyper, Tensor perturbed, bool backup_exists,
                       MaybeTensor inv_scale) {
  const Rows all = rows_of(rows, grads);
  int64_t* cell = cell_of(perturbed);
  perturb(all, value_of(norm), table_of(hyper, kPerturbColumns, all), value_or(inv_scale, 1), backup_exists);
  *cell = 1;
}

void prepared_restore_(Tensor rows, Tensor perturbed) {
  int64_t* cell = cell_of(perturbed);
  restore(rows_of(rows));
  *cell = 0;
}

void prepared_restore_sgd_(Tensor rows, Tensor grads, Tensor hyper, Tensor perturbed, MaybeTensor inv_scale,
                           MaybeTensor found_inf, MaybeTensor clip) {
  const Rows all = rows_of(rows, grads);
  const double* table = table_of(hyper, kSgdColumns, all);
  check_state(all, table, kSgdColumns, kMomentum, kState0);
  int64_t* cell = cell_of(perturbed);
  restore_sgd(all, table, policy_of(inv_scale, found_inf, clip));
  *cell = 0;
}

void prepared_restore_adamw_(Tensor rows, Tensor grads, Tensor hyper, Tensor perturbed, MaybeTensor inv_scale,
                             MaybeTensor found_inf, MaybeTensor clip) {
  const Rows all = rows_of(rows, grads);
  const double* table = table_of(hyper, kAdamColumns, all);
  check_state(all, table, kAdamColumns, kAmsgrad, kState2);
  int64_t* cell = cell_of(perturbed);
  restore_adamw(all, table, policy_of(inv_scale, found_inf, clip));
  *cell = 0;
}

int64_t cpu_capability() {
  const char* name = kernels().name;
  return std::strcmp(name, "avx512") == 0 ? 2 : std::strcmp(name, "avx2") == 0 ? 1 : 0;
}

int64_t row_words() { return kRowWords; }

}  // namespace sam_fused::cpu
