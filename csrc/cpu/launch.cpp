#include "cpu/launch.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cmath>
#include <fstream>
#include <string>
#include <vector>

#if defined(__linux__)
#include <unistd.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu/kernels.h"

namespace sam_fused::cpu {
namespace {

// Below this the region's start costs more than it saves.
constexpr int64_t kSerialElements = 256 * 1024;

// More pieces than threads, so a thread that another process holds up is overtaken instead of waited for.
constexpr int64_t kPiecesPerThread = 8;

// What the kernel says, in preference to sysconf: glibc 2.36 takes some AMD processors' 32 MiB for 320.
int64_t last_level_cache_bytes() {
  static const int64_t bytes = [] {
    for (const char* index : {"3", "2"}) {
      std::ifstream file(std::string("/sys/devices/system/cpu/cpu0/cache/index") + index + "/size");
      int64_t size = 0;
      char unit = 0;
      if (file >> size >> unit && size > 0) return unit == 'M' ? size << 20 : unit == 'K' ? size << 10 : size;
    }
    int64_t found = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    found = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (found <= 0) found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return found > 0 ? found : int64_t{32} << 20;
  }();
  return bytes;
}

Plan plan_of(Rows rows) {
  return Plan(rows.count, [rows](int64_t t) { return rows.data[t].numel; });
}

// Non-temporal stores pay when what is written will have left the cache before anybody reads it.
bool worth_streaming(const Plan& plan, int64_t accesses) {
  return plan.elements() * accesses * int64_t{4} > last_level_cache_bytes();
}

// Non-temporal stores are not ordered with the store that tells other threads that a piece is done; this orders them. Once a
// piece and not once a chunk: it waits until the write buffers are empty.
void order_streamed_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// f(chunk number, Chunk) for every chunk, each exactly once, on torch's threads.
template <class F>
void for_each_chunk(const Plan& plan, const F& f) {
  const auto run = [&](int64_t begin, int64_t end) {
    plan.for_each(begin, end, f);
    order_streamed_stores();
  };
  const int64_t threads = torch::stable::get_num_threads();
  if (threads <= 1 || plan.elements() < kSerialElements) return run(0, plan.chunks());

  const int64_t pieces = threads * kPiecesPerThread;
  const std::vector<int64_t> bounds = plan.split(pieces);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t taken = next.fetch_add(1); taken < pieces; taken = next.fetch_add(1)) {
      run(bounds[taken], bounds[taken + 1]);
    }
  });
}

}  // namespace

double grad_norm(Rows rows, double weight, double inv_scale) {
  const Plan plan = plan_of(rows);
  std::vector<SumOfSquares> slots(plan.chunks());
  const Kernels& kernel = kernels();
  for_each_chunk(plan, [&](int64_t c, const Chunk& chunk) {
    kernel.sum_of_squares(rows.data[chunk.tensor], chunk, weight, inv_scale, &slots[c]);
  });
  SumOfSquares total;
  for (const SumOfSquares& slot : slots) total = total + slot;
  return norm_of(total);
}

void perturb(Rows rows, double norm, const double* hyper, double inv_scale, bool backup_exists) {
  const Plan plan = plan_of(rows);
  const Kernels& kernel = kernels();
  const bool stream = worth_streaming(plan, 4);
  std::vector<PerturbConstants> constants(rows.count);
  for (int64_t t = 0; t < rows.count; ++t) {
    const double* h = hyper + rows.data[t].group * kPerturbColumns;
    const Perturbation p = perturbation(h, norm, inv_scale, rows.data[t].dtype(kWeight) == DType::kFloat64);
    constants[t] = {p.c, p.move, backup_exists, stream};
  }
  // Forwards, as the norm went: starting with the gradients that it left in the cache measured slower.
  for_each_chunk(plan, [&](int64_t, const Chunk& chunk) {
    kernel.perturb(rows.data[chunk.tensor], chunk, constants[chunk.tensor]);
  });
}

void restore(Rows rows) {
  const Plan plan = plan_of(rows);
  const Kernels& kernel = kernels();
  const bool stream = worth_streaming(plan, 2);
  for_each_chunk(plan,
                 [&](int64_t, const Chunk& chunk) { kernel.restore(rows.data[chunk.tensor], chunk, stream); });
}

void restore_accumulate(Rows rows, double weight, bool fresh) {
  const Plan plan = plan_of(rows);
  const Kernels& kernel = kernels();
  const bool stream = worth_streaming(plan, 5);
  for_each_chunk(plan, [&](int64_t, const Chunk& chunk) {
    kernel.accumulate(rows.data[chunk.tensor], chunk, {weight, fresh, stream});
  });
}

void restore_sgd(Rows rows, const double* hyper, const GradPolicy& policy) {
  if (policy.found_inf) return restore(rows);
  const Plan plan = plan_of(rows);
  const Kernels& kernel = kernels();
  const bool stream = worth_streaming(plan, 5);
  std::vector<SgdConstants<double>> constants(rows.count);
  for (int64_t t = 0; t < rows.count; ++t) {
    constants[t] = sgd_constants(hyper + rows.data[t].group * kSgdColumns, policy.factor);
  }
  for_each_chunk(plan, [&](int64_t, const Chunk& chunk) {
    const TensorRow& row = rows.data[chunk.tensor];
    // Where the weight is its own backup it is read, so it is already in the cache.
    const bool stream_weight = stream && row.address[kWeight] != row.address[kBackup];
    kernel.sgd(row, chunk, constants[chunk.tensor], policy.weight, stream_weight);
  });
}

void restore_adamw(Rows rows, const double* hyper, const GradPolicy& policy) {
  if (policy.found_inf) return restore(rows);
  const Plan plan = plan_of(rows);
  const Kernels& kernel = kernels();
  const bool stream = worth_streaming(plan, 7);
  std::vector<AdamConstants<double>> constants(rows.count);
  double previous_step = -1;
  for (int64_t t = 0; t < rows.count; ++t) {
    TensorRow& row = rows.data[t];
    const bool wide_step = row.dtype(kStep) == DType::kFloat64;
    const double step = 1 + (wide_step ? *static_cast<double*>(row.address[kStep]) : *static_cast<float*>(row.address[kStep]));
    if (wide_step) *static_cast<double*>(row.address[kStep]) = step;
    else *static_cast<float*>(row.address[kStep]) = static_cast<float>(step);
    // Two powers a tensor would be most of a small model's step; nearly always the previous tensor's serve.
    if (t > 0 && step == previous_step && row.group == rows.data[t - 1].group) {
      constants[t] = constants[t - 1];
      continue;
    }
    previous_step = step;
    const double* h = hyper + row.group * kAdamColumns;
    constants[t] = adam_constants(h, power(h[kBeta1], step), power(h[kBeta2], step), policy.factor);
  }
  for_each_chunk(plan, [&](int64_t, const Chunk& chunk) {
    const TensorRow& row = rows.data[chunk.tensor];
    const bool stream_weight = stream && row.address[kWeight] != row.address[kBackup];
    kernel.adam(row, chunk, constants[chunk.tensor], policy.weight, stream_weight);
  });
}

}  // namespace sam_fused::cpu
