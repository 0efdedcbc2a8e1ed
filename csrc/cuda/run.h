// The operations on one device: tables, launches, and nothing of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/arguments.h"
#include "plan.h"

struct CUstream_st;

namespace sam_fused::cuda {

using Stream = CUstream_st*;  // cudaStream_t, without the toolkit's headers in files that torch's are in

// Where things are in a device table, an int64 block: the ticket, the tensors' first chunks, their rows, the norm's sums.
struct TableLayout {
  int64_t tensors, sums;

  static constexpr int64_t kTicket = 0, kFirstChunk = 1;
  int64_t rows() const { return kFirstChunk + tensors + 1; }
  int64_t norm_sums() const { return rows() + tensors * kRowWords; }
  int64_t words() const { return norm_sums() + 3 * sums; }
};

// Tensors of one device: their rows on the host, with this call's gradients, and the table made from them on the device.
struct Set {
  Rows rows;
  Plan plan;
  int64_t* table;
  Stream stream;

  TableLayout layout() const;
};

// A launch has a block per chunk, and CUDA counts blocks in an int. To be called before anything is written.
void check_chunks(const Plan& plan);

// Words to device memory, as arguments of kernels: in the order of the stream, and safe inside a graph capture.
void upload(const int64_t* words, int64_t count, int64_t* to, Stream stream);

// Writes the table but for the norm's sums. To be done once for rows that stay as they are: gradients are not looked up there.
void write_table(const Set& set);

struct Norm {
  void* norm;  // fp32, or fp64 if wide
  bool wide;
  float* found_inf;
  int64_t* overflows;  // becomes one more where the norm is not finite; null: not counted
};

// `weight`, here and in a GradPolicy: there if the rows have accumulators, and then kernels of their own read them.
void grad_norm(const Set& set, const Norm& result, Scalar weight, Scalar inv_scale);
void perturb(const Set& set, Scalar norm, const Hyper& hyper, Scalar inv_scale, bool backup_exists);
void restore(const Set& set);
// If a launch fails, those before it have restored and accumulated: every tensor is as it was or done.
void restore_accumulate(const Set& set, Scalar weight, bool fresh);
void restore_sgd(const Set& set, const Hyper& hyper, const GradPolicy& policy);
void restore_adamw(const Set& set, const Hyper& hyper, const GradPolicy& policy);

inline Plan plan_of(Rows rows) {
  return Plan(rows.count, [rows](int64_t t) { return rows.data[t].numel; }, kBlockChunk);
}

// f(Launch) for runs of at most kMaxGradients tensors: the launches of one operation.
template <class F>
void for_each_launch(const Set& set, F f) {
  const TableLayout layout = set.layout();
  for (int64_t tensor = 0; tensor < layout.tensors; tensor += kMaxGradients) {
    const int64_t tensors = std::min(kMaxGradients, layout.tensors - tensor);
    Launch launch{};
    launch.rows = reinterpret_cast<TensorRow*>(set.table + layout.rows());
    launch.first_chunk = set.table + TableLayout::kFirstChunk;
    launch.ticket = reinterpret_cast<uint32_t*>(set.table + TableLayout::kTicket);
    launch.first_tensor = tensor;
    launch.tensors = tensors;
    launch.begin = set.plan.first_chunk(tensor);
    launch.end = set.plan.first_chunk(tensor + tensors);
    f(launch);
  }
}

// How the norm's launch over these chunks deals them out: every block has some.
inline int64_t chunks_a_norm_block(int64_t chunks) { return (chunks + kNormSums - 1) / kNormSums; }
inline int64_t norm_blocks(int64_t chunks) {
  const int64_t each = std::max<int64_t>(1, chunks_a_norm_block(chunks));
  return (chunks + each - 1) / each;
}

inline TableLayout Set::layout() const {
  TableLayout found{plan.tensors(), 0};
  for (int64_t tensor = 0; tensor < found.tensors; tensor += kMaxGradients) {
    const int64_t end = std::min(found.tensors, tensor + kMaxGradients);
    found.sums += norm_blocks(plan.first_chunk(end) - plan.first_chunk(tensor));
  }
  return found;
}

inline void fill(Gradients& gradients, const Set& set, const Launch& launch) {
  for (int64_t t = 0; t < launch.tensors; ++t) {
    gradients.addresses[t] = reinterpret_cast<uint64_t>(set.rows.data[launch.first_tensor + t].address[kGrad]);
  }
}

// Blocks for a launch whose last block has something to do even where all tensors are empty.
inline int64_t at_least_one_block(const Launch& launch) { return std::max<int64_t>(1, launch.end - launch.begin); }

}  // namespace sam_fused::cuda
