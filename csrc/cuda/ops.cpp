#include "cuda/ops.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/run.h"
#include "hyper.h"

#if !defined(SAM_FUSED_CUDA_ARCHITECTURES)
#define SAM_FUSED_CUDA_ARCHITECTURES ""
#endif

namespace sam_fused::cuda {
namespace {

using torch::headeronly::ScalarType;

#if defined(SAM_FUSED_EMULATED)
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
Stream current_stream(int32_t) { return nullptr; }
#else
using torch::stable::accelerator::DeviceGuard;
Stream current_stream(int32_t index) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  return static_cast<Stream>(stream);
}
#endif

Scalar scalar_of(const Tensor& scalar, Place place) {
  check_scalar(scalar, place);
  return {scalar.data_ptr(), scalar.scalar_type() == ScalarType::Double};
}

Scalar scalar_of(const MaybeTensor& scalar, Place place) {
  return scalar.has_value() ? scalar_of(*scalar, place) : Scalar{nullptr, false};
}

int64_t* count_of(const MaybeTensor& overflows, Place place) {
  if (!overflows.has_value()) return nullptr;
  STD_TORCH_CHECK(place.holds(*overflows) && overflows->numel() == 1 && overflows->scalar_type() == ScalarType::Long,
                  "sam_fused: expected the count of overflows to be one int64 on ", place.name());
  return static_cast<int64_t*>(overflows->data_ptr());
}

Norm norm_of(const Tensor& norm, const Tensor& found_inf, const MaybeTensor& overflows, Place place) {
  check_scalar(norm, place);
  check_scalar(found_inf, place);
  STD_TORCH_CHECK(found_inf.scalar_type() == ScalarType::Float, "sam_fused: expected a float32 flag");
  return {norm.data_ptr(), norm.scalar_type() == ScalarType::Double, static_cast<float*>(found_inf.data_ptr()),
          count_of(overflows, place)};
}

Plan checked_plan(Rows rows) {
  Plan plan = plan_of(rows);
  check_chunks(plan);
  return plan;
}

int64_t* words_of(const Tensor& table) { return static_cast<int64_t*>(table.data_ptr()); }

// One call on one device: the device is current while it lives, and it keeps the table.
class Session {
 public:
  // A table for this call alone.
  Session(Rows rows, const Tensor& like)
      : place_(Place::of(like)),
        guard_(place_.index()),
        set_{rows, checked_plan(rows), nullptr, current_stream(place_.index())} {
    table_ = torch::stable::new_empty(like, std::vector<int64_t>{set_.layout().words()}, ScalarType::Long);
    set_.table = words_of(table_);
    write_table(set_);
  }

  // A table that is there already.
  Session(Rows rows, const MaybeTensor& table, Place place)
      : place_(place),
        guard_(place_.index()),
        set_{rows, checked_plan(rows), nullptr, current_stream(place_.index())} {
    STD_TORCH_CHECK(table.has_value() && place.holds(*table) && table->scalar_type() == ScalarType::Long &&
                        table->is_contiguous() && table->numel() == set_.layout().words(),
                    "sam_fused: expected the device table of these rows, as device_table makes it");
    table_ = *table;
    set_.table = words_of(table_);
  }

  const Set& set() const { return set_; }
  Place place() const { return place_; }
  Tensor table() const { return table_; }

  // By value where the table is small and on the CPU; what is larger is copied to the device first.
  Hyper hyper(const Tensor& table, int64_t columns) {
    check_table(table, columns, set_.rows);
    Hyper found;
    found.table = nullptr;
    if (!table.is_cpu()) {
      STD_TORCH_CHECK(place_.holds(table), "sam_fused: expected the hyper-parameter table on the CPU or on ", place_.name());
      found.table = static_cast<const double*>(table.data_ptr());
    } else if (table.numel() <= kInlineHyper) {
      std::copy_n(static_cast<const double*>(table.data_ptr()), table.numel(), found.values);
    } else {
      hyper_ = torch::stable::new_empty(table_, std::vector<int64_t>{table.numel()}, ScalarType::Long);
      upload(static_cast<const int64_t*>(table.data_ptr()), table.numel(), words_of(hyper_), set_.stream);
      found.table = static_cast<const double*>(hyper_.data_ptr());
    }
    return found;
  }

  // Where the host can read the table; the kernels themselves take missing state for none.
  void check_state(const Tensor& hyper, int64_t columns, int64_t wanted_by, Role role) const {
    if (!hyper.is_cpu()) return;
    sam_fused::check_state(set_.rows, static_cast<const double*>(hyper.data_ptr()), columns, wanted_by, role);
  }

  // The weight of a micro-batch, there if the rows have accumulators.
  Scalar weight(const MaybeTensor& weight, Role deciding) const {
    check_accumulators(set_.rows, deciding, weight);
    return scalar_of(weight, place_);
  }

 private:
  Place place_;
  DeviceGuard guard_;
  Set set_;
  Tensor table_, hyper_;
};

GradPolicy policy_of(const Session& session, const MaybeTensor& weight, const MaybeTensor& inv_scale,
                     const MaybeTensor& found_inf, const MaybeTensor& clip) {
  const Place place = session.place();
  return {session.weight(weight, kWeight), scalar_of(inv_scale, place), scalar_of(found_inf, place), scalar_of(clip, place)};
}

void step_sgd(Session& session, const Tensor& hyper, const MaybeTensor& weight, const MaybeTensor& inv_scale,
              const MaybeTensor& found_inf, const MaybeTensor& clip) {
  const GradPolicy policy = policy_of(session, weight, inv_scale, found_inf, clip);
  const Hyper table = session.hyper(hyper, kSgdColumns);
  session.check_state(hyper, kSgdColumns, kMomentum, kState0);
  restore_sgd(session.set(), table, policy);
}

void step_adamw(Session& session, const Tensor& hyper, const MaybeTensor& weight, const MaybeTensor& inv_scale,
                const MaybeTensor& found_inf, const MaybeTensor& clip) {
  const GradPolicy policy = policy_of(session, weight, inv_scale, found_inf, clip);
  const Hyper table = session.hyper(hyper, kAdamColumns);
  session.check_state(hyper, kAdamColumns, kAmsgrad, kState2);
  restore_adamw(session.set(), table, policy);
}

}  // namespace

std::tuple<Tensor, Tensor> grad_norm(Tensors grads, Tensors params, Ints scaling, Tensors accumulators, MaybeTensor weight,
                                     MaybeTensor inv_scale) {
  const Place place = Place::of(grads.at(0));
  RowList list = norm_rows(grads, params, scaling, accumulators, place);
  Session session(list.rows(), grads[0]);
  Tensor norm = new_scalar(grads[0], norm_dtype(grads));
  Tensor found_inf = new_scalar(grads[0], ScalarType::Float);
  const Norm result = norm_of(norm, found_inf, std::nullopt, place);
  grad_norm(session.set(), result, session.weight(weight, kGrad), scalar_of(inv_scale, place));
  return {norm, found_inf};
}

void perturb_(Tensors params, Tensors backups, Tensors grads, Tensor norm, Tensor hyper, Ints groups, Ints scaling,
              bool backup_exists, MaybeTensor inv_scale) {
  const Place place = Place::of(params.at(0));
  RowList list = perturb_rows(params, backups, grads, groups, scaling, place);
  const Scalar length = scalar_of(norm, place), inverse = scalar_of(inv_scale, place);
  Session session(list.rows(), params[0]);
  perturb(session.set(), length, session.hyper(hyper, kPerturbColumns), inverse, backup_exists);
}

void restore_(Tensors params, Tensors backups) {
  RowList list = restore_rows(params, backups, Place::of(params.at(0)));
  restore(Session(list.rows(), params[0]).set());
}

void restore_accumulate_(Tensors params, Tensors backups, Tensors grads, Tensors accumulators, Tensor weight, bool fresh) {
  RowList list = accumulate_rows(params, backups, grads, accumulators, Place::of(params.at(0)));
  const Session session(list.rows(), params[0]);
  restore_accumulate(session.set(), session.weight(weight, kWeight), fresh);
}

void restore_sgd_(Tensors params, Tensors backups, Tensors grads, Tensors momentum_buffers, Tensor hyper, Ints groups,
                  Ints first, Tensors accumulators, MaybeTensor weight, MaybeTensor inv_scale, MaybeTensor found_inf,
                  MaybeTensor clip) {
  const Place place = Place::of(params.at(0));
  RowList list = sgd_rows(params, backups, grads, momentum_buffers, groups, first, accumulators, place);
  Session session(list.rows(), params[0]);
  step_sgd(session, hyper, weight, inv_scale, found_inf, clip);
}

void restore_adamw_(Tensors params, Tensors backups, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                    Tensors max_exp_avg_sqs, Tensors steps, Tensor hyper, Ints groups, Tensors accumulators,
                    MaybeTensor weight, MaybeTensor inv_scale, MaybeTensor found_inf, MaybeTensor clip) {
  const Place place = Place::of(params.at(0));
  RowList list =
      adamw_rows(params, backups, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, groups, accumulators, place);
  Session session(list.rows(), params[0]);
  step_adamw(session, hyper, weight, inv_scale, found_inf, clip);
}

void prepared_grad_norm_(Tensor rows, Tensor grads, Tensor norm, Tensor found_inf, MaybeTensor weight, MaybeTensor inv_scale,
                         MaybeTensor overflows, MaybeTensor table) {
  const Place place = Place::of(norm);
  const Session session(rows_of(rows, grads), table, place);
  const Norm result = norm_of(norm, found_inf, overflows, place);
  grad_norm(session.set(), result, session.weight(weight, kGrad), scalar_of(inv_scale, place));
}

void prepared_perturb_(Tensor rows, Tensor grads, Tensor norm, Tensor hyper, Tensor perturbed, bool backup_exists,
                       MaybeTensor inv_scale, MaybeTensor table) {
  const Place place = Place::of(norm);
  Session session(rows_of(rows, grads), table, place);
  int64_t* cell = cell_of(perturbed);
  perturb(session.set(), scalar_of(norm, place), session.hyper(hyper, kPerturbColumns), scalar_of(inv_scale, place),
          backup_exists);
  *cell = 1;
}

void prepared_restore_(Tensor rows, Tensor perturbed, MaybeTensor table) {
  STD_TORCH_CHECK(table.has_value(), "sam_fused: expected the device table of these rows, as device_table makes it");
  int64_t* cell = cell_of(perturbed);
  restore(Session(rows_of(rows), table, Place::of(*table)).set());
  *cell = 0;
}

void prepared_restore_accumulate_(Tensor rows, Tensor grads, Tensor weight, Tensor perturbed, bool fresh, MaybeTensor table) {
  STD_TORCH_CHECK(table.has_value(), "sam_fused: expected the device table of these rows, as device_table makes it");
  const Session session(rows_of(rows, grads), table, Place::of(*table));
  int64_t* cell = cell_of(perturbed);
  restore_accumulate(session.set(), session.weight(weight, kWeight), fresh);
  *cell = 0;
}

void prepared_restore_sgd_(Tensor rows, Tensor grads, Tensor hyper, Tensor perturbed, MaybeTensor weight,
                           MaybeTensor inv_scale, MaybeTensor found_inf, MaybeTensor clip, MaybeTensor table) {
  STD_TORCH_CHECK(table.has_value(), "sam_fused: expected the device table of these rows, as device_table makes it");
  Session session(rows_of(rows, grads), table, Place::of(*table));
  int64_t* cell = cell_of(perturbed);
  step_sgd(session, hyper, weight, inv_scale, found_inf, clip);
  *cell = 0;
}

void prepared_restore_adamw_(Tensor rows, Tensor grads, Tensor hyper, Tensor perturbed, MaybeTensor weight,
                             MaybeTensor inv_scale, MaybeTensor found_inf, MaybeTensor clip, MaybeTensor table) {
  STD_TORCH_CHECK(table.has_value(), "sam_fused: expected the device table of these rows, as device_table makes it");
  Session session(rows_of(rows, grads), table, Place::of(*table));
  int64_t* cell = cell_of(perturbed);
  step_adamw(session, hyper, weight, inv_scale, found_inf, clip);
  *cell = 0;
}

Tensor device_table(Tensor rows, Tensor like) { return Session(rows_of(rows), like).table(); }

std::string cuda_architectures() { return SAM_FUSED_CUDA_ARCHITECTURES; }

}  // namespace sam_fused::cuda
