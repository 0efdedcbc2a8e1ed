// plan.h and element.h behind a C interface, for ctypes. Neither needs torch.
#include <cstddef>

#include "element.h"
#include "plan.h"

using namespace sam_fused;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT Plan* plan_new(int64_t tensors, const int64_t* numels, int64_t chunk) {
  return new Plan(tensors, [numels](int64_t t) { return numels[t]; }, chunk);
}
EXPORT void plan_free(Plan* plan) { delete plan; }
EXPORT int64_t plan_tensors(const Plan* plan) { return plan->tensors(); }
EXPORT int64_t plan_chunks(const Plan* plan) { return plan->chunks(); }
EXPORT int64_t plan_elements(const Plan* plan) { return plan->elements(); }
EXPORT int64_t plan_tensor_of(const Plan* plan, int64_t c) { return plan->tensor_of(c); }
EXPORT void plan_chunk(const Plan* plan, int64_t c, int64_t* out) {
  const Chunk chunk = plan->chunk(c);
  out[0] = chunk.tensor, out[1] = chunk.begin, out[2] = chunk.count;
}
EXPORT void plan_split(const Plan* plan, int64_t pieces, int64_t* out) {
  const std::vector<int64_t> bounds = plan->split(pieces);
  std::copy(bounds.begin(), bounds.end(), out);
}
// Four numbers a visit: chunk, tensor, begin, count. Returns the visits; writes no more than `room` of them.
EXPORT int64_t plan_walk(const Plan* plan, int64_t begin, int64_t end, int64_t room, int64_t* out) {
  int64_t visits = 0;
  const auto visit = [&](int64_t c, const Chunk& chunk) {
    if (visits < room) {
      int64_t* to = out + 4 * visits;
      to[0] = c, to[1] = chunk.tensor, to[2] = chunk.begin, to[3] = chunk.count;
    }
    ++visits;
  };
  plan->for_each(begin, end, visit);
  return visits;
}
EXPORT int64_t plan_constant(int which) {
  const int64_t constants[] = {kChunk, kTensorOverhead, kRowWords, kRoles};
  return constants[which];
}
EXPORT int64_t row_offset(int which) {
  const size_t offsets[] = {offsetof(TensorRow, numel), offsetof(TensorRow, group),  offsetof(TensorRow, scaling),
                            offsetof(TensorRow, first), offsetof(TensorRow, dtypes), offsetof(TensorRow, address)};
  return static_cast<int64_t>(offsets[which]);
}
EXPORT uint64_t row_dtypes_after(uint64_t before, int role, int dtype) {
  TensorRow row{};
  row.dtypes = before;
  row.set_dtype(static_cast<Role>(role), static_cast<DType>(dtype));
  return row.dtype(static_cast<Role>(role)) == static_cast<DType>(dtype) ? row.dtypes : ~uint64_t{0};
}

namespace {

template <class T>
void perturb_all(int64_t n, const T* w, const T* g, T c, int adaptive, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = adaptive ? perturbed_adaptive(w[i], g[i], c) : perturbed(w[i], g[i], c);
}

// k: negative_lr, momentum, one_minus_dampening, weight_decay, grad_factor; flags: nesterov 1, first 4.
template <class T>
void sgd_all(int64_t n, const T* w, const T* g, const T* k, int flags, T* v, T* out) {
  const SgdConstants<T> constants{k[0], k[1], k[2], k[3], k[4], k[1] != 0, k[3] != 0, (flags & 1) != 0};
  for (int64_t i = 0; i < n; ++i) {
    const T d = constants.has_weight_decay ? sgd_direction<true>(constants, w[i], g[i])
                                           : sgd_direction<false>(constants, w[i], g[i]);
    if (constants.has_momentum) v[i] = flags & 4 ? d : sgd_momentum(constants, d, v[i]);
    const T v_new = constants.has_momentum ? v[i] : d;
    out[i] = constants.nesterov ? sgd_weight<true>(constants, w[i], d, v_new) : sgd_weight<false>(constants, w[i], d, v_new);
  }
}

// k: one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, decay_factor, negative_step_size, bias2_sqrt, grad_factor.
template <bool kCoupled, bool kAmsgrad, class T>
void adam_some(int64_t n, const T* w, const T* g, const T* k, T* m, T* v, T* largest, T* out) {
  const AdamConstants<T> constants{k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7], k[8], kCoupled, kAmsgrad};
  for (int64_t i = 0; i < n; ++i) {
    const AdamState<T> before{w[i], m[i], v[i], largest[i]};
    const AdamState<T> s = adam<kAmsgrad>(constants, before, adam_direction<kCoupled>(constants, w[i], g[i]));
    out[i] = s.w, m[i] = s.exp_avg, v[i] = s.exp_avg_sq, largest[i] = s.max_exp_avg_sq;
  }
}

// flags: decoupled 1 (then decay_factor is applied and weight_decay is not), amsgrad 4.
template <class T>
void adam_all(int64_t n, const T* w, const T* g, const T* k, int flags, T* m, T* v, T* largest, T* out) {
  const bool coupled = k[4] != 0 && !(flags & 1), amsgrad = (flags & 4) != 0;
  const auto run = coupled ? (amsgrad ? adam_some<true, true, T> : adam_some<true, false, T>)
                           : (amsgrad ? adam_some<false, true, T> : adam_some<false, false, T>);
  run(n, w, g, k, m, v, largest, out);
}

}  // namespace

#define BOTH_TYPES(T, suffix)                                                                                         \
  EXPORT void perturb_##suffix(int64_t n, const T* w, const T* g, T c, int adaptive, T* out) {                        \
    perturb_all(n, w, g, c, adaptive, out);                                                                           \
  }                                                                                                                   \
  EXPORT void sgd_##suffix(int64_t n, const T* w, const T* g, const T* k, int flags, T* v, T* out) {                  \
    sgd_all(n, w, g, k, flags, v, out);                                                                               \
  }                                                                                                                   \
  EXPORT void adam_##suffix(int64_t n, const T* w, const T* g, const T* k, int flags, T* m, T* v, T* x, T* out) {     \
    adam_all(n, w, g, k, flags, m, v, x, out);                                                                        \
  }
BOTH_TYPES(float, float)
BOTH_TYPES(double, double)
