// What a kernel is given by value, and the device table behind it.
//
// A kernel's arguments may be 32,764 bytes. The rows of a set of tensors do not change between steps, so they live in a device
// table that is written once; the gradients' addresses change with every backward pass, so they travel with the launch: no copy
// to the device, no memory that a captured graph could find changed, and one launch for up to kMaxGradients tensors of any op.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan.h"

namespace sam_fused::cuda {

// Gradients, hyper-parameters and words of a table that fit into a kernel's arguments.
//
// kBlockChunk: elements of a tensor that make one block's work: enough to hide finding them behind the blocks beside it, and
// few enough that a 25 M parameter model fills an H200 several times over, so that the last blocks leave little of it idle.
//
// kNormSums: blocks of a launch of the norm, and so sums for its last block to add. With more chunks a block takes several.
//
// Tests make all of them small, to see them overflow.
#if defined(SAM_FUSED_SMALL_ARGUMENTS)
inline constexpr int64_t kMaxGradients = 37, kInlineHyper = 16, kUploadWords = 53, kBlockChunk = 1024, kNormSums = 5;
#else
inline constexpr int64_t kMaxGradients = 3712, kInlineHyper = 256, kUploadWords = 4080, kBlockChunk = 8192, kNormSums = 4096;
#endif
inline constexpr size_t kArgumentBytes = 32764;

// A scalar tensor on the device, fp32 or fp64. It is read by the kernel: the host never waits for it.
struct Scalar {
  const void* address;  // null: there is none
  bool wide;
};

// The part of a table that a launch works on: a run of tensors and the chunks that they own.
struct Launch {
  TensorRow* rows;
  const int64_t* first_chunk;  // of every tensor of the table, and the number of all chunks
  uint32_t* ticket;
  int64_t first_tensor, tensors;
  int64_t begin, end;  // chunks; none where all tensors are empty
};

struct Hyper {
  const double* table;  // on the device; null: `values` holds it
  double values[kInlineHyper];
};

struct Gradients {
  uint64_t addresses[kMaxGradients];  // of the launch's tensors
};

// What a base step's gradient is multiplied with, and whether the step is skipped.
struct GradPolicy {
  Scalar weight;  // of the last micro-batch; there if the rows have accumulators
  Scalar inv_scale, found_inf, clip;
};

}  // namespace sam_fused::cuda
