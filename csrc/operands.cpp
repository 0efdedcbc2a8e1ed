#include "operands.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

namespace sam_fused {

using torch::headeronly::ScalarType;

namespace {

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

void check_role(Rows rows, Role role) {
  for (int64_t i = 0; i < rows.count; ++i) {
    STD_TORCH_CHECK(rows.data[i].numel == 0 || rows.data[i].address[role] != nullptr,
                    "sam_fused: expected a list with an entry for tensor ", i, ", got none");
  }
}

bool may_be_unused(Role role) { return role == kState0 || role == kState1 || role == kState2; }

}  // namespace

DType code_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, "sam_fused: expected float32, float64, bfloat16 or float16");
  }
}

void check_scalar(const Tensor& scalar, Place place) {
  const ScalarType dtype = scalar.scalar_type();
  STD_TORCH_CHECK(place.holds(scalar) && scalar.numel() == 1 && (dtype == ScalarType::Double || dtype == ScalarType::Float),
                  "sam_fused: expected scalars to be float32 or float64 tensors of one element on ", place.name(), ", got ",
                  scalar.numel(), " elements on ", Place::of(scalar).name());
}

RowList::RowList(Tensors sizes, Place place) : sizes_(std::move(sizes)), place_(place), rows_(sizes_.size()) {
  for (size_t i = 0; i < sizes_.size(); ++i) rows_[i] = TensorRow{sizes_[i].numel(), 0, 0, 0, 0, {}};
}

RowList& RowList::role(Role role, const Tensors& tensors) {
  if (tensors.empty()) return *this;
  check_length(tensors.size());
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Tensor& tensor = tensors[i];
    // An entry that a group has no use for may be any empty tensor, and stays null: refused below where it is needed.
    if (tensor.numel() == 0 && may_be_unused(role)) continue;
    STD_TORCH_CHECK(place_.holds(tensor), "sam_fused: expected tensor ", i, " of every list on ", place_.name(), ", got ",
                    Place::of(tensor).name());
    if (role == kStep) check_scalar(tensor, place_);
    else {
      STD_TORCH_CHECK(same_layout(sizes_[i], tensor), "sam_fused: expected tensor ", i,
                      " of every list to lie in memory as its parameter does");
    }
    rows_[i].address[role] = tensor.data_ptr();
    rows_[i].set_dtype(role, code_of(tensor));
  }
  return *this;
}

RowList& RowList::ints(int64_t TensorRow::*field, const Ints& values) {
  if (values.empty()) return *this;
  check_length(values.size());
  for (size_t i = 0; i < values.size(); ++i) rows_[i].*field = values[i];
  return *this;
}

RowList& RowList::backups_have_the_weights_dtype() {
  for (const TensorRow& row : rows_) {
    STD_TORCH_CHECK(row.dtype(kWeight) == row.dtype(kBackup), "sam_fused: expected backups of their parameters' dtype");
  }
  return *this;
}

void RowList::check_length(size_t length) const {
  STD_TORCH_CHECK(length == rows_.size(), "sam_fused: expected lists of one length, got ", length, " and ", rows_.size());
}

RowList norm_rows(const Tensors& grads, const Tensors& params, const Ints& scaling, const Tensors& accumulators, Place place) {
  RowList list(grads, place);
  list.role(kGrad, grads).role(kWeight, params).role(kAccumulator, accumulators).ints(&TensorRow::scaling, scaling);
  for (const int64_t code : scaling) {
    STD_TORCH_CHECK(code == 0 || params.size() == grads.size(),
                    "sam_fused: expected params because a tensor is scaled by them, got none");
  }
  check_role(list.rows(), kGrad);
  if (!params.empty()) check_role(list.rows(), kWeight);
  return list;
}

RowList perturb_rows(const Tensors& params, const Tensors& backups, const Tensors& grads, const Ints& groups,
                     const Ints& scaling, Place place) {
  RowList list(params, place);
  list.role(kWeight, params).role(kBackup, backups).role(kGrad, grads);
  list.ints(&TensorRow::group, groups).ints(&TensorRow::scaling, scaling);
  list.backups_have_the_weights_dtype();
  for (const Role role : {kWeight, kBackup, kGrad}) check_role(list.rows(), role);
  return list;
}

RowList restore_rows(const Tensors& params, const Tensors& backups, Place place) {
  RowList list(params, place);
  list.role(kWeight, params).role(kBackup, backups).backups_have_the_weights_dtype();
  for (const Role role : {kWeight, kBackup}) check_role(list.rows(), role);
  return list;
}

RowList accumulate_rows(const Tensors& params, const Tensors& backups, const Tensors& grads, const Tensors& accumulators,
                        Place place) {
  RowList list = perturb_rows(params, backups, grads, {}, {}, place);
  list.role(kAccumulator, accumulators);
  check_role(list.rows(), kAccumulator);
  return list;
}

RowList sgd_rows(const Tensors& params, const Tensors& backups, const Tensors& grads, const Tensors& momentum_buffers,
                 const Ints& groups, const Ints& first, const Tensors& accumulators, Place place) {
  RowList list = perturb_rows(params, backups, grads, groups, {}, place);
  list.role(kState0, momentum_buffers).role(kAccumulator, accumulators).ints(&TensorRow::first, first);
  return list;
}

RowList adamw_rows(const Tensors& params, const Tensors& backups, const Tensors& grads, const Tensors& exp_avgs,
                   const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs, const Tensors& steps, const Ints& groups,
                   const Tensors& accumulators, Place place) {
  RowList list = perturb_rows(params, backups, grads, groups, {}, place);
  list.role(kState0, exp_avgs).role(kState1, exp_avg_sqs).role(kState2, max_exp_avg_sqs).role(kStep, steps);
  list.role(kAccumulator, accumulators);
  for (const Role role : {kState0, kState1, kStep}) check_role(list.rows(), role);
  return list;
}

ScalarType norm_dtype(const Tensors& grads) {
  const auto is_wide = [](const Tensor& grad) { return grad.scalar_type() == ScalarType::Double; };
  return std::any_of(grads.begin(), grads.end(), is_wide) ? ScalarType::Double : ScalarType::Float;
}

Rows rows_of(const Tensor& table) {
  STD_TORCH_CHECK(table.is_cpu() && table.dim() == 2 && table.size(1) == kRowWords && table.is_contiguous() &&
                      table.scalar_type() == ScalarType::Long,
                  "sam_fused: expected an int64 table of rows as ops/prepared.py builds it");
  return {static_cast<TensorRow*>(table.data_ptr()), table.size(0)};
}

Rows rows_of(const Tensor& table, const Tensor& grads) {
  const Rows rows = rows_of(table);
  STD_TORCH_CHECK(grads.is_cpu() && grads.numel() == rows.count && grads.scalar_type() == ScalarType::Long &&
                      grads.is_contiguous(),
                  "sam_fused: expected one int64 gradient address per row");
  const auto* addresses = static_cast<const int64_t*>(grads.data_ptr());
  for (int64_t i = 0; i < rows.count; ++i) {
    STD_TORCH_CHECK(addresses[i] != 0 || rows.data[i].numel == 0, "sam_fused: expected an address for gradient ", i);
    rows.data[i].address[kGrad] = reinterpret_cast<void*>(addresses[i]);
  }
  return rows;
}

void check_table(const Tensor& hyper, int64_t columns, Rows rows) {
  STD_TORCH_CHECK(hyper.dim() == 2 && hyper.size(1) == columns && hyper.is_contiguous() &&
                      hyper.scalar_type() == ScalarType::Double,
                  "sam_fused: expected a contiguous float64 hyper-parameter table with ", columns, " columns");
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t group = rows.data[i].group;
    STD_TORCH_CHECK(group >= 0 && group < hyper.size(0), "sam_fused: expected groups below ", hyper.size(0), ", got ", group);
  }
}

void check_state(Rows rows, const double* hyper, int64_t columns, int64_t wanted_by, Role role) {
  for (int64_t i = 0; i < rows.count; ++i) {
    const TensorRow& row = rows.data[i];
    STD_TORCH_CHECK(row.numel == 0 || row.address[role] != nullptr || hyper[row.group * columns + wanted_by] == 0,
                    "sam_fused: expected optimizer state for tensor ", i, " because its group uses it, got none");
  }
}

void check_accumulators(Rows rows, Role deciding, const MaybeTensor& weight) {
  for (int64_t i = 0; i < rows.count; ++i) {
    const TensorRow& row = rows.data[i];
    if (row.numel == 0) continue;
    STD_TORCH_CHECK((row.address[kAccumulator] != nullptr) == weight.has_value(),
                    "sam_fused: expected a weight where there are accumulators and only there, got ",
                    weight.has_value() ? "no accumulator" : "no weight", " for tensor ", i);
    const DType wanted = row.dtype(deciding) == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    STD_TORCH_CHECK(!weight.has_value() || row.dtype(kAccumulator) == wanted, "sam_fused: expected accumulator ", i,
                    " of the dtype that its tensor is computed in");
  }
}

int64_t* cell_of(const Tensor& perturbed) {
  STD_TORCH_CHECK(perturbed.is_cpu() && perturbed.numel() == 1 && perturbed.scalar_type() == ScalarType::Long,
                  "sam_fused: expected the perturbed cell to be one int64 on the CPU");
  return static_cast<int64_t*>(perturbed.data_ptr());
}

Tensor new_scalar(const Tensor& like, ScalarType dtype) {
  return torch::stable::new_empty(like, std::vector<int64_t>{}, dtype);
}

}  // namespace sam_fused
