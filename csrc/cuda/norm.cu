// The norm: a sum of squares per chunk, and the root of their sum by the last block to finish. One launch, no atomics on values,
// so the same bits on every run.
#include "cuda/access.h"
#include "cuda/launch.h"
#include "cuda/run.h"

namespace sam_fused::cuda {
namespace {

struct NormArguments {
  Launch launch;
  double* slots;         // [3][chunks of the table]
  int64_t chunks;        // of the table
  bool finishes;         // the last launch of an operation: its last block adds up the slots of all
  Scalar inv_scale;
  Norm result;
  Gradients gradients;
};

struct NormScratch {
  SumScratch sums;
  bool last;
};

// fp64: squares may leave its range. All else: squares, and products of two values, are exact or rightly rounded in fp64.
template <class T>
__device__ void add(SumOfSquares& sum, double& middle, double x) {
  if constexpr (std::is_same_v<T, double>) add_square(sum, x);
  else middle = fused_multiply_add(x, x, middle);
}

// One load stream is a third of what the other kernels have in flight: four iterations at a time make up for it.
constexpr int kUnroll = 4;

template <bool kAdaptive, class A, class T>
__device__ SumOfSquares chunk_sum(const TensorRow& row, void* gradient, const Chunk& chunk, bool aligned, T inv_scale) {
  const A g = A::at(gradient, row.dtype(kGrad)), w = A::at(row.address[kWeight], row.dtype(kWeight));
  SumOfSquares sum;
  double middle[A::kWidth] = {};
  sweep<A::kWidth, kUnroll>(chunk, aligned, [&](auto width, int64_t i) {
    constexpr int V = decltype(width)::value;
    const auto gradients = g.template load<V>(i);
    decltype(w.template load<V>(i)) weights{};
    if constexpr (kAdaptive) weights = w.template load<V>(i);
    for (int v = 0; v < V; ++v) {
      // Scaling before squaring: what overflows unscaled need not overflow scaled, and the other way round.
      double x = static_cast<double>(g.template get<T>(gradients, v) * inv_scale);
      if constexpr (kAdaptive) x = static_cast<double>(w.template get<T>(weights, v)) * x;
      add<T>(sum, middle[v], x);
    }
  });
  for (int v = 0; v < A::kWidth; ++v) sum.middle += middle[v];
  return sum;
}

__device__ SumOfSquares slot_sum(const NormArguments& a) {
  SumOfSquares sum;
  for (int64_t c = threadIdx.x; c < a.chunks; c += blockDim.x) {
    // Past the first-level cache, which is not told of what other multiprocessors write.
    SumOfSquares slot;
    slot.small = __ldcg(a.slots + c);
    slot.middle = __ldcg(a.slots + a.chunks + c);
    slot.big = __ldcg(a.slots + 2 * a.chunks + c);
    sum = sum + slot;
  }
  return sum;
}

__device__ void write_norm(const Norm& result, double norm) {
  // The norm as it is stored decides whether it is finite.
  const double stored = result.wide ? norm : static_cast<double>(static_cast<float>(norm));
  if (result.wide) *static_cast<double*>(result.norm) = norm;
  else *static_cast<float*>(result.norm) = static_cast<float>(norm);
  *result.found_inf = is_finite(stored) ? 0.0f : 1.0f;
}

__global__ void __launch_bounds__(kThreads, kNormBlocks) grad_norm_kernel(const __grid_constant__ NormArguments a) {
  NormScratch& scratch = shared<NormScratch>();
  const int64_t c = a.launch.begin + blockIdx.x;
  if (c < a.launch.end) {
    const Chunk chunk = find_chunk(a.launch, c);
    const TensorRow& row = a.launch.rows[chunk.tensor];
    void* gradient = gradient_of(a.gradients, a.launch, chunk.tensor);
    const bool adaptive = static_cast<Scaling>(row.scaling) == Scaling::kAbsWeight;
    const Survey found = survey(row, gradient, bit(kGrad) | (adaptive ? bit(kWeight) : 0));
    const double inv_scale = value_or(a.inv_scale, 1);
    SumOfSquares sum;
    with_access(found, row.dtype(kGrad), [&](auto access) {
      using A = typename decltype(access)::Operand;
      using T = typename decltype(access)::Arithmetic;
      const T factor = static_cast<T>(inv_scale);
      if (adaptive) sum = chunk_sum<true, A, T>(row, gradient, chunk, found.aligned, factor);
      else sum = chunk_sum<false, A, T>(row, gradient, chunk, found.aligned, factor);
    });
    sum = block_sum(scratch.sums, sum);
    if (threadIdx.x == 0) {
      a.slots[c] = sum.small;
      a.slots[a.chunks + c] = sum.middle;
      a.slots[2 * a.chunks + c] = sum.big;
    }
  }
  if (!a.finishes || !is_last_block(a.launch.ticket, scratch.last)) return;
  const SumOfSquares total = block_sum(scratch.sums, slot_sum(a));
  if (threadIdx.x == 0) write_norm(a.result, norm_of(total));
}

}  // namespace

void grad_norm(const Set& set, const Norm& result, Scalar inv_scale) {
  NormArguments arguments;
  arguments.slots = reinterpret_cast<double*>(set.table + set.layout().slots());
  arguments.chunks = set.plan.chunks();
  arguments.inv_scale = inv_scale;
  arguments.result = result;
  for_each_launch(set, [&](const Launch& part) {
    arguments.launch = part;
    arguments.finishes = part.first_tensor + part.tensors == set.plan.tensors();
    fill(arguments.gradients, set, part);
    launch(grad_norm_kernel, at_least_one_block(part), set.stream, arguments);
  });
}

}  // namespace sam_fused::cuda
