// Perturb with backup, restore, and restore at the end of a micro-batch, which keeps its gradient.
#include "cuda/access.h"
#include "cuda/launch.h"
#include "cuda/run.h"
#include "hyper.h"

namespace sam_fused::cuda {
namespace {

struct PerturbArguments {
  Launch launch;
  Scalar norm, inv_scale;
  bool backup_exists;
  Hyper hyper;
  Gradients gradients;
};

struct RestoreArguments {
  Launch launch;
};

struct AccumulateArguments {
  Launch launch;
  Scalar weight;
  bool fresh;
  Gradients gradients;
};

template <class A, class T>
__device__ void perturb_chunk(const TensorRow& row, void* gradient, const Chunk& chunk, bool aligned, T c, bool backup_exists) {
  const A weight = A::at(row.address[kWeight], row.dtype(kWeight)), backup = A::at(row.address[kBackup], row.dtype(kBackup));
  const A grad = A::at(gradient, row.dtype(kGrad));
  const A clean = backup_exists ? backup : weight;
  const bool adaptive = static_cast<Scaling>(row.scaling) == Scaling::kAbsWeight;
  sweep<A::kWidth>(chunk, aligned, [&](auto width, int64_t i) {
    constexpr int V = decltype(width)::value;
    auto w = clean.template load<V>(i);
    const auto g = grad.template load<V>(i);
    if (!backup_exists) backup.template store<V>(i, w);
    for (int v = 0; v < V; ++v) {
      const T from = clean.template get<T>(w, v), along = grad.template get<T>(g, v);
      weight.template set<T>(w, v, adaptive ? perturbed_adaptive(from, along, c) : perturbed(from, along, c));
    }
    weight.template store<V>(i, w);
  });
}

__global__ void __launch_bounds__(kThreads, kAscentBlocks) perturb_kernel(const __grid_constant__ PerturbArguments a) {
  Perturbation& p = shared<Perturbation>();
  // From the end: the norm went forwards over the same gradients, and left the last of them in the second-level cache.
  const int64_t c = a.launch.end - 1 - blockIdx.x;
  const Chunk chunk = find_chunks(a.launch, c, c + 1);
  const TensorRow& row = a.launch.rows[chunk.tensor];
  if (threadIdx.x == 0) {
    const double* h = hyper_row(a.hyper, row.group, kPerturbColumns);
    p = perturbation(h, value_or(a.norm, 0), value_or(a.inv_scale, 1), row.dtype(kWeight) == DType::kFloat64);
  }
  __syncthreads();
  if (!p.move) {
    if (a.backup_exists) copy_chunk(row.address[kWeight], row.address[kBackup], row.dtype(kWeight), chunk);
    else copy_chunk(row.address[kBackup], row.address[kWeight], row.dtype(kWeight), chunk);
    return;
  }
  void* gradient = gradient_of(a.gradients, a.launch, chunk.tensor);
  const Survey found = survey(row, gradient, bit(kWeight) | bit(kBackup) | bit(kGrad));
  with_access(found, row.dtype(kWeight), [&](auto access) {
    using A = typename decltype(access)::Operand;
    using T = typename decltype(access)::Arithmetic;
    perturb_chunk<A, T>(row, gradient, chunk, found.aligned, static_cast<T>(p.c), a.backup_exists);
  });
}

__global__ void __launch_bounds__(kThreads, kAscentBlocks) restore_kernel(const __grid_constant__ RestoreArguments a) {
  const int64_t c = a.launch.begin + blockIdx.x;
  const Chunk chunk = find_chunks(a.launch, c, c + 1);
  const TensorRow& row = a.launch.rows[chunk.tensor];
  copy_chunk(row.address[kWeight], row.address[kBackup], row.dtype(kWeight), chunk);
}

// One sweep and not a copy before it: the backup, the gradient and the accumulator are in flight together.
template <class A, class T>
__device__ void accumulate_chunk(const TensorRow& row, void* gradient, const Chunk& chunk, bool aligned, T share, bool fresh) {
  const A weight = A::at(row.address[kWeight], row.dtype(kWeight)), backup = A::at(row.address[kBackup], row.dtype(kBackup));
  const A grad = A::at(gradient, row.dtype(kGrad));
  const auto accumulator = Typed<T>::at(row.address[kAccumulator], {});
  const bool moved = row.address[kWeight] != row.address[kBackup];
  sweep<A::kWidth>(chunk, aligned, [&](auto width, int64_t i) {
    constexpr int V = decltype(width)::value;
    decltype(backup.template load<V>(i)) w{};
    if (moved) w = backup.template load<V>(i);
    const auto g = grad.template load<V>(i);
    Pack<T, V> sum{};
    if (!fresh) sum = accumulator.template load<V>(i);
    for (int v = 0; v < V; ++v) {
      const T along = grad.template get<T>(g, v);
      sum.values[v] = fresh ? share * along : accumulated(sum.values[v], along, share);
    }
    if (moved) weight.template store<V>(i, w);
    accumulator.template store<V>(i, sum);
  });
}

__global__ void __launch_bounds__(kThreads, kAscentBlocks) accumulate_kernel(const __grid_constant__ AccumulateArguments a) {
  const double share = value_or(a.weight, 1);
  const int64_t c = a.launch.begin + blockIdx.x;
  const Chunk chunk = find_chunks(a.launch, c, c + 1);
  const TensorRow& row = a.launch.rows[chunk.tensor];
  void* gradient = gradient_of(a.gradients, a.launch, chunk.tensor);
  const Survey found = survey(row, gradient, bit(kWeight) | bit(kBackup) | gradient_bits<true>());
  with_access(found, row.dtype(kWeight), [&](auto access) {
    using A = typename decltype(access)::Operand;
    using T = typename decltype(access)::Arithmetic;
    accumulate_chunk<A, T>(row, gradient, chunk, found.aligned, static_cast<T>(share), a.fresh);
  });
}

void restore_part(const Set& set, const Launch& part) {
  if (part.begin < part.end) launch(restore_kernel, part.end - part.begin, set.stream, RestoreArguments{part});
}

}  // namespace

void perturb(const Set& set, Scalar norm, const Hyper& hyper, Scalar inv_scale, bool backup_exists) {
  PerturbArguments arguments;
  arguments.norm = norm;
  arguments.inv_scale = inv_scale;
  arguments.backup_exists = backup_exists;
  arguments.hyper = hyper;
  std::vector<Launch> moved;
  try {
    for_each_launch(set, [&](const Launch& part) {
      if (part.begin == part.end) return;
      arguments.launch = part;
      fill(arguments.gradients, set, part);
      launch(perturb_kernel, part.end - part.begin, set.stream, arguments);
      moved.push_back(part);
    });
  } catch (...) {
    // All of the weights or none: the caller is told that they have not moved.
    for (const Launch& part : moved) restore_part(set, part);
    throw;
  }
}

void restore(const Set& set) {
  for_each_launch(set, [&](const Launch& part) { restore_part(set, part); });
}

void restore_accumulate(const Set& set, Scalar weight, bool fresh) {
  AccumulateArguments arguments;
  arguments.weight = weight;
  arguments.fresh = fresh;
  for_each_launch(set, [&](const Launch& part) {
    if (part.begin == part.end) return;
    arguments.launch = part;
    fill(arguments.gradients, set, part);
    launch(accumulate_kernel, part.end - part.begin, set.stream, arguments);
  });
}

}  // namespace sam_fused::cuda
