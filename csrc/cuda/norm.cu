// The norm: a sum of squares per block, and the root of their sum by the last block to finish. One launch, no atomics on
// values, and as many blocks as there are chunks to a fixed limit, whatever the card: the same bits on every run.
#include "cuda/access.h"
#include "cuda/launch.h"
#include "cuda/run.h"

namespace sam_fused::cuda {
namespace {

struct NormArguments {
  Launch launch;
  int64_t chunks_a_block;
  double* sums;          // [3][all], of x 2^600, x, x 2^-600; see squares.h
  int64_t first, all;    // of them: this launch's first block's, and all launches'
  bool scaled;           // some gradient is fp64: without one only the middle row is in use
  bool finishes;         // the last launch of an operation: its last block adds up the sums of all
  Scalar weight, inv_scale;
  Norm result;
  Gradients gradients;
};

struct NormScratch {
  SumScratch block;
  bool last;
};

// fp64: squares may leave its range. All else: squares, and products of two values, are exact or rightly rounded in fp64.
template <class T>
__device__ void add(SumOfSquares& sum, double& middle, double x) {
  if constexpr (std::is_same_v<T, double>) add_square(sum, x);
  else middle = fused_multiply_add(x, x, middle);
}

// One load stream is a third of what the other kernels have in flight: four iterations at a time make up for it. Accumulators
// are a second one, twice as wide beside halves: two iterations do.
template <bool kAccumulates>
constexpr int kUnroll = kAccumulates ? 2 : 4;

template <bool kAdaptive, int kAtATime, class A, class T, class G>
__device__ SumOfSquares chunk_sum(const TensorRow& row, const G& g, const Chunk& chunk, bool aligned, T inv_scale) {
  const A w = A::at(row.address[kWeight], row.dtype(kWeight));
  SumOfSquares sum;
  double middle[A::kWidth] = {};
  sweep<A::kWidth, kAtATime>(chunk, aligned, [&](auto width, int64_t i) {
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

template <bool kAccumulates>
__device__ SumOfSquares run_sum(const NormArguments& a, const Chunk& chunk, double weight, double inv_scale) {
  const TensorRow& row = a.launch.rows[chunk.tensor];
  void* gradient = gradient_of(a.gradients, a.launch, chunk.tensor);
  const bool adaptive = static_cast<Scaling>(row.scaling) == Scaling::kAbsWeight;
  const Survey found = survey(row, gradient, gradient_bits<kAccumulates>() | (adaptive ? bit(kWeight) : 0));
  SumOfSquares sum;
  with_access(found, row.dtype(kGrad), [&](auto access) {
    using A = typename decltype(access)::Operand;
    using T = typename decltype(access)::Arithmetic;
    constexpr int kAtATime = kUnroll<kAccumulates>;
    const auto g = gradient_operand<kAccumulates, A, T>(row, gradient, weight);
    const T factor = static_cast<T>(inv_scale);
    if (adaptive) sum = chunk_sum<true, kAtATime, A, T>(row, g, chunk, found.aligned, factor);
    else sum = chunk_sum<false, kAtATime, A, T>(row, g, chunk, found.aligned, factor);
  });
  return sum;
}

// One row of the sums, a share per thread. Past the first-level cache, which is not told of what other multiprocessors write.
__device__ double share_of(const double* sums, int64_t all) {
  double share = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < all; i += blockDim.x) share += __ldcg(sums + i);
  return share;
}

__device__ void write_norm(const Norm& result, double norm) {
  // The norm as it is stored decides whether it is finite.
  const double stored = result.wide ? norm : static_cast<double>(static_cast<float>(norm));
  if (result.wide) *static_cast<double*>(result.norm) = norm;
  else *static_cast<float*>(result.norm) = static_cast<float>(norm);
  const bool finite = is_finite(stored);
  *result.found_inf = finite ? 0.0f : 1.0f;
  if (!finite && result.overflows != nullptr) ++*result.overflows;
}

template <bool kAccumulates>
__device__ void norm_pass(const NormArguments& a, NormScratch& scratch) {
  const double weight = kAccumulates ? value_or(a.weight, 1) : 1, inv_scale = value_or(a.inv_scale, 1);
  int64_t c = a.launch.begin + blockIdx.x * a.chunks_a_block;
  const int64_t end = c + a.chunks_a_block < a.launch.end ? c + a.chunks_a_block : a.launch.end;
  if (c < end) {
    SumOfSquares sum;
    while (c < end) {
      const Chunk run = find_chunks(a.launch, c, end);
      sum = sum + run_sum<kAccumulates>(a, run, weight, inv_scale);
      c += (run.count + kBlockChunk - 1) / kBlockChunk;
    }
    sum = block_sum(scratch.block, sum);
    if (threadIdx.x == 0) {
      double* own = a.sums + a.first + blockIdx.x;
      own[a.all] = sum.middle;
      if (a.scaled) own[0] = sum.small, own[2 * a.all] = sum.big;
    }
  }
  if (!a.finishes || !is_last_block(a.launch.ticket, scratch.last)) return;
  SumOfSquares share;
  share.middle = share_of(a.sums + a.all, a.all);
  if (a.scaled) share.small = share_of(a.sums, a.all), share.big = share_of(a.sums + 2 * a.all, a.all);
  const SumOfSquares total = block_sum(scratch.block, share);
  if (threadIdx.x == 0) write_norm(a.result, norm_of(total));
}

__global__ void __launch_bounds__(kThreads, kNormBlocks) grad_norm_kernel(const __grid_constant__ NormArguments a) {
  norm_pass<false>(a, shared<NormScratch>());
}

__global__ void __launch_bounds__(kThreads, kNormBlocks) summed_grad_norm_kernel(const __grid_constant__ NormArguments a) {
  norm_pass<true>(a, shared<NormScratch>());
}

bool any_wide(Rows rows) {
  return std::any_of(rows.data, rows.data + rows.count, [](const TensorRow& r) { return r.dtype(kGrad) == DType::kFloat64; });
}

}  // namespace

void grad_norm(const Set& set, const Norm& result, Scalar weight, Scalar inv_scale) {
  const auto kernel = weight.address == nullptr ? grad_norm_kernel : summed_grad_norm_kernel;
  NormArguments arguments;
  arguments.sums = reinterpret_cast<double*>(set.table + set.layout().norm_sums());
  arguments.first = 0;
  arguments.all = set.layout().sums;
  arguments.scaled = any_wide(set.rows);
  arguments.weight = weight;
  arguments.inv_scale = inv_scale;
  arguments.result = result;
  for_each_launch(set, [&](const Launch& part) {
    const int64_t chunks = part.end - part.begin, blocks = norm_blocks(chunks);
    arguments.launch = part;
    arguments.chunks_a_block = chunks_a_norm_block(chunks);
    arguments.finishes = part.first_tensor + part.tensors == set.plan.tensors();
    fill(arguments.gradients, set, part);
    launch(kernel, std::max<int64_t>(1, blocks), set.stream, arguments);
    arguments.first += blocks;
  });
}

}  // namespace sam_fused::cuda
