// The last pass: restore and base optimizer in one.
#include "cuda/access.h"
#include "cuda/launch.h"
#include "cuda/run.h"
#include "hyper.h"

namespace sam_fused::cuda {
namespace {

struct SgdArguments {
  Launch launch;
  GradPolicy policy;
  bool clears_first;  // some tensor's momentum may be created by this step
  Hyper hyper;
  Gradients gradients;
};

struct AdamArguments {
  Launch launch;
  GradPolicy policy;
  Hyper hyper;
  Gradients gradients;
};

struct SgdScratch {
  SgdConstants<double> constants;
  bool last;
};

struct AdamScratch {
  double power[2];
  AdamConstants<double> constants;
  bool last;
};

enum class Momentum { kNone, kFirst, kRunning };

template <class A, class T, class G>
__device__ void sgd_chunk(const TensorRow& row, const G& grad, const Chunk& chunk, bool aligned, const SgdConstants<T>& k,
                          Momentum momentum) {
  const auto at = [&row](Role role) { return A::at(row.address[role], row.dtype(role)); };
  const A weight = at(kWeight), backup = at(kBackup), buffer = at(kState0);
  sweep<A::kWidth>(chunk, aligned, [&](auto width, int64_t i) {
    constexpr int V = decltype(width)::value;
    auto w = backup.template load<V>(i);
    const auto g = grad.template load<V>(i);
    decltype(buffer.template load<V>(i)) m{};
    if (momentum == Momentum::kRunning) m = buffer.template load<V>(i);
    for (int v = 0; v < V; ++v) {
      const T from = backup.template get<T>(w, v), along = grad.template get<T>(g, v);
      const T d = k.has_weight_decay ? sgd_direction<true>(k, from, along) : sgd_direction<false>(k, from, along);
      T velocity = d;
      if (momentum == Momentum::kRunning) velocity = sgd_momentum(k, d, buffer.template get<T>(m, v));
      if (momentum != Momentum::kNone) buffer.template set<T>(m, v, velocity);
      const bool nesterov = k.nesterov && momentum != Momentum::kNone;
      weight.template set<T>(w, v, nesterov ? sgd_weight<true>(k, from, d, velocity) : sgd_weight<false>(k, from, d, velocity));
    }
    if (momentum != Momentum::kNone) buffer.template store<V>(i, m);
    weight.template store<V>(i, w);
  });
}

template <bool kAccumulates>
__device__ void sgd_block(const SgdArguments& a, SgdScratch& scratch, int64_t c) {
  const double share = kAccumulates ? value_or(a.policy.weight, 1) : 1;
  const Chunk chunk = find_chunks(a.launch, c, c + 1);
  const TensorRow& row = a.launch.rows[chunk.tensor];
  if (skips(a.policy)) return copy_chunk(row.address[kWeight], row.address[kBackup], row.dtype(kWeight), chunk);
  if (threadIdx.x == 0) scratch.constants = sgd_constants(hyper_row(a.hyper, row.group, kSgdColumns), grad_factor(a.policy));
  __syncthreads();
  const SgdConstants<double>& k = scratch.constants;
  const Momentum momentum = !k.has_momentum || row.address[kState0] == nullptr ? Momentum::kNone
                            : row.first                                        ? Momentum::kFirst
                                                                               : Momentum::kRunning;
  void* gradient = gradient_of(a.gradients, a.launch, chunk.tensor);
  const uint32_t state = momentum == Momentum::kNone ? 0 : bit(kState0);
  const Survey found = survey(row, gradient, bit(kWeight) | bit(kBackup) | gradient_bits<kAccumulates>() | state);
  with_access(found, row.dtype(kWeight), [&](auto access) {
    using A = typename decltype(access)::Operand;
    using T = typename decltype(access)::Arithmetic;
    const auto grad = gradient_operand<kAccumulates, A, T>(row, gradient, share);
    sgd_chunk<A, T>(row, grad, chunk, found.aligned, rounded<T>(k), momentum);
  });
}

template <bool kAccumulates>
__device__ void sgd_pass(const SgdArguments& a, SgdScratch& scratch) {
  const int64_t c = a.launch.begin + blockIdx.x;
  if (c < a.launch.end) sgd_block<kAccumulates>(a, scratch, c);
  // The buffers exist from here on. The host cannot know: whether the step was skipped is known on the device alone.
  if (!a.clears_first || !is_last_block(a.launch.ticket, scratch.last) || skips(a.policy)) return;
  for (int64_t t = threadIdx.x; t < a.launch.tensors; t += blockDim.x) a.launch.rows[a.launch.first_tensor + t].first = 0;
}

__global__ void __launch_bounds__(kThreads, kSgdBlocks) sgd_kernel(const __grid_constant__ SgdArguments a) {
  sgd_pass<false>(a, shared<SgdScratch>());
}

__global__ void __launch_bounds__(kThreads, kSgdBlocks) summed_sgd_kernel(const __grid_constant__ SgdArguments a) {
  sgd_pass<true>(a, shared<SgdScratch>());
}

template <bool kAmsgrad, class A, class T, class G>
__device__ void adam_chunk(const TensorRow& row, const G& grad, const Chunk& chunk, bool aligned, const AdamConstants<T>& k) {
  const auto at = [&row](Role role) { return A::at(row.address[role], row.dtype(role)); };
  const A weight = at(kWeight), backup = at(kBackup);
  const A first = at(kState0), second = at(kState1), largest = at(kState2);
  sweep<A::kWidth>(chunk, aligned, [&](auto width, int64_t i) {
    constexpr int V = decltype(width)::value;
    auto w = backup.template load<V>(i);
    const auto g = grad.template load<V>(i);
    auto m = first.template load<V>(i), s = second.template load<V>(i);
    decltype(largest.template load<V>(i)) x{};
    if constexpr (kAmsgrad) x = largest.template load<V>(i);
    for (int v = 0; v < V; ++v) {
      AdamState<T> state{backup.template get<T>(w, v), first.template get<T>(m, v), second.template get<T>(s, v), T{0}};
      if constexpr (kAmsgrad) state.max_exp_avg_sq = largest.template get<T>(x, v);
      const T along = grad.template get<T>(g, v);
      state = adam<kAmsgrad>(k, state, k.coupled_weight_decay ? adam_direction<true>(k, state.w, along)
                                                              : adam_direction<false>(k, state.w, along));
      if constexpr (kAmsgrad) largest.template set<T>(x, v, state.max_exp_avg_sq);
      first.template set<T>(m, v, state.exp_avg);
      second.template set<T>(s, v, state.exp_avg_sq);
      weight.template set<T>(w, v, state.w);
    }
    if constexpr (kAmsgrad) largest.template store<V>(i, x);
    first.template store<V>(i, m);
    second.template store<V>(i, s);
    weight.template store<V>(i, w);
  });
}

// Steps taken so far; a tensor's count is a scalar tensor of its own.
__device__ double step_count(const TensorRow& row) {
  const void* at = row.address[kStep];
  if (row.dtype(kStep) == DType::kFloat64) return *static_cast<const double*>(at);
  return static_cast<double>(*static_cast<const float*>(at));
}

__device__ void advance(const TensorRow& row) {
  if (row.address[kStep] == nullptr) return;
  const double next = step_count(row) + 1;
  if (row.dtype(kStep) == DType::kFloat64) *static_cast<double*>(row.address[kStep]) = next;
  else *static_cast<float*>(row.address[kStep]) = static_cast<float>(next);
}

template <bool kAccumulates>
__device__ void adam_block(const AdamArguments& a, AdamScratch& scratch, int64_t c) {
  const double share = kAccumulates ? value_or(a.policy.weight, 1) : 1;
  const Chunk chunk = find_chunks(a.launch, c, c + 1);
  const TensorRow& row = a.launch.rows[chunk.tensor];
  if (skips(a.policy)) return copy_chunk(row.address[kWeight], row.address[kBackup], row.dtype(kWeight), chunk);
  const double* h = hyper_row(a.hyper, row.group, kAdamColumns);
  // Two threads side by side: the powers are a few hundred dependent fp64 operations.
  if (threadIdx.x < 2) scratch.power[threadIdx.x] = power(h[kBeta1 + threadIdx.x], step_count(row) + 1);
  __syncthreads();
  if (threadIdx.x == 0) scratch.constants = adam_constants(h, scratch.power[0], scratch.power[1], grad_factor(a.policy));
  __syncthreads();
  AdamConstants<double> k = scratch.constants;
  k.amsgrad = k.amsgrad && row.address[kState2] != nullptr;
  void* gradient = gradient_of(a.gradients, a.launch, chunk.tensor);
  const uint32_t state = bit(kState0) | bit(kState1) | (k.amsgrad ? bit(kState2) : 0);
  const Survey found = survey(row, gradient, bit(kWeight) | bit(kBackup) | gradient_bits<kAccumulates>() | state);
  with_access(found, row.dtype(kWeight), [&](auto access) {
    using A = typename decltype(access)::Operand;
    using T = typename decltype(access)::Arithmetic;
    const auto grad = gradient_operand<kAccumulates, A, T>(row, gradient, share);
    if (k.amsgrad) adam_chunk<true, A, T>(row, grad, chunk, found.aligned, rounded<T>(k));
    else adam_chunk<false, A, T>(row, grad, chunk, found.aligned, rounded<T>(k));
  });
}

template <bool kAccumulates>
__device__ void adam_pass(const AdamArguments& a, AdamScratch& scratch) {
  const int64_t c = a.launch.begin + blockIdx.x;
  if (c < a.launch.end) adam_block<kAccumulates>(a, scratch, c);
  // Every block has read its tensor's count when the last one comes here.
  if (!is_last_block(a.launch.ticket, scratch.last) || skips(a.policy)) return;
  for (int64_t t = threadIdx.x; t < a.launch.tensors; t += blockDim.x) advance(a.launch.rows[a.launch.first_tensor + t]);
}

__global__ void __launch_bounds__(kThreads, kAdamBlocks) adam_kernel(const __grid_constant__ AdamArguments a) {
  adam_pass<false>(a, shared<AdamScratch>());
}

__global__ void __launch_bounds__(kThreads, kAdamBlocks) summed_adam_kernel(const __grid_constant__ AdamArguments a) {
  adam_pass<true>(a, shared<AdamScratch>());
}

bool any_first(Rows rows) {
  return std::any_of(rows.data, rows.data + rows.count, [](const TensorRow& row) { return row.first != 0; });
}

}  // namespace

void restore_sgd(const Set& set, const Hyper& hyper, const GradPolicy& policy) {
  const auto kernel = policy.weight.address == nullptr ? sgd_kernel : summed_sgd_kernel;
  SgdArguments arguments;
  arguments.policy = policy;
  arguments.clears_first = any_first(set.rows);
  arguments.hyper = hyper;
  for_each_launch(set, [&](const Launch& part) {
    arguments.launch = part;
    fill(arguments.gradients, set, part);
    launch(kernel, at_least_one_block(part), set.stream, arguments);
  });
}

void restore_adamw(const Set& set, const Hyper& hyper, const GradPolicy& policy) {
  const auto kernel = policy.weight.address == nullptr ? adam_kernel : summed_adam_kernel;
  AdamArguments arguments;
  arguments.policy = policy;
  arguments.hyper = hyper;
  for_each_launch(set, [&](const Launch& part) {
    arguments.launch = part;
    fill(arguments.gradients, set, part);
    launch(kernel, at_least_one_block(part), set.stream, arguments);
  });
}

}  // namespace sam_fused::cuda
