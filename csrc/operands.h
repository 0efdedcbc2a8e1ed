// What the torch-facing files of every device share: lists and prepared tables of tensors become rows, and whatever could make
// a kernel leave a tensor's memory is checked. Arguments were checked in Python with better sentences; but anybody can call
// these operations through torch.ops.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "plan.h"

namespace sam_fused {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

// Where an operation's tensors have to be.
class Place {
 public:
  static Place cpu() { return Place(-1); }
  static Place of(const Tensor& tensor) { return Place(tensor.is_cpu() ? -1 : tensor.get_device_index()); }

  bool holds(const Tensor& tensor) const {
    return is_cpu() ? tensor.is_cpu() : tensor.is_cuda() && index_ == tensor.get_device_index();
  }
  bool is_cpu() const { return index_ < 0; }
  int32_t index() const { return index_; }
  std::string name() const { return is_cpu() ? "cpu" : "cuda:" + std::to_string(index_); }

 private:
  explicit Place(int32_t index) : index_(index) {}
  int32_t index_;
};

DType code_of(const Tensor& tensor);

// A float32 or float64 tensor of one element there.
void check_scalar(const Tensor& scalar, Place place);

// Rows built from lists. A role that an operation has no list for stays null and is never read.
class RowList {
 public:
  RowList(Tensors sizes, Place place);

  RowList& role(Role role, const Tensors& tensors);
  RowList& ints(int64_t TensorRow::*field, const Ints& values);
  RowList& backups_have_the_weights_dtype();  // a backup is copied byte by byte

  Rows rows() { return {rows_.data(), static_cast<int64_t>(rows_.size())}; }

 private:
  void check_length(size_t length) const;

  Tensors sizes_;
  Place place_;
  std::vector<TensorRow> rows_;
};

// The rows of the list operations, with every list that an operation needs in them.
RowList norm_rows(const Tensors& grads, const Tensors& params, const Ints& scaling, const Tensors& accumulators, Place place);
RowList perturb_rows(const Tensors& params, const Tensors& backups, const Tensors& grads, const Ints& groups,
                     const Ints& scaling, Place place);
RowList restore_rows(const Tensors& params, const Tensors& backups, Place place);
RowList sgd_rows(const Tensors& params, const Tensors& backups, const Tensors& grads, const Tensors& momentum_buffers,
                 const Ints& groups, const Ints& first, const Tensors& accumulators, Place place);
RowList adamw_rows(const Tensors& params, const Tensors& backups, const Tensors& grads, const Tensors& exp_avgs,
                   const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs, const Tensors& steps, const Ints& groups,
                   const Tensors& accumulators, Place place);

RowList accumulate_rows(const Tensors& params, const Tensors& backups, const Tensors& grads, const Tensors& accumulators,
                        Place place);

// A norm, and its flag, of these gradients: fp64 if any of them is.
torch::headeronly::ScalarType norm_dtype(const Tensors& grads);

// The rows of a prepared table, an int64 tensor on the CPU; the second form enters the gradients' addresses.
Rows rows_of(const Tensor& table);
Rows rows_of(const Tensor& table, const Tensor& grads);

// A contiguous fp64 table with a row for each group that the rows name.
void check_table(const Tensor& hyper, int64_t columns, Rows rows);

// State that the base optimizer reads must be there for every tensor whose group asks for it.
void check_state(Rows rows, const double* hyper, int64_t columns, int64_t wanted_by, Role role);

// The last micro-batch's weight comes with accumulators, or neither does. Those have the dtype that the tensor in `deciding` is
// computed in (fp64 for fp64, else fp32): sums of many micro-batches need it, and GPU kernels take it for granted.
void check_accumulators(Rows rows, Role deciding, const MaybeTensor& weight);

// The cell that says whether weights are perturbed: looked up before they move, written after.
int64_t* cell_of(const Tensor& perturbed);

Tensor new_scalar(const Tensor& like, torch::headeronly::ScalarType dtype);

}  // namespace sam_fused
