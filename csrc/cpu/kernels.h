// The CPU kernels: one table of functions per instruction set, each working on one chunk of one tensor.
#pragma once

#include <cstdint>

#include "element.h"
#include "hyper.h"
#include "plan.h"
#include "squares.h"
#include "storage.h"

namespace sam_fused::cpu {

// What a chunk of a perturbation does. A zero coefficient copies.
struct PerturbConstants {
  double c;             // rho / (norm + perturb_eps) * inv_scale
  bool move;            // false: nothing moves, the backup is still written
  bool backup_exists;   // the backup holds the weight already: do not write it
  bool stream;          // non-temporal stores for the backup
};

// What a chunk of a micro-batch's restore does with the gradient.
struct AccumulateConstants {
  double weight;  // of the micro-batch
  bool fresh;     // the accumulator is written and not read
  bool stream;
};

// Where a row has an accumulator, the gradient is accumulator + weight * gradient; where not, `weight` is ignored.
struct Kernels {
  const char* name;
  void (*sum_of_squares)(const TensorRow&, const Chunk&, double weight, double inv_scale, SumOfSquares*);
  void (*perturb)(const TensorRow&, const Chunk&, const PerturbConstants&);
  void (*restore)(const TensorRow&, const Chunk&, bool stream);
  void (*accumulate)(const TensorRow&, const Chunk&, const AccumulateConstants&);
  void (*sgd)(const TensorRow&, const Chunk&, const SgdConstants<double>&, double weight, bool stream);
  void (*adam)(const TensorRow&, const Chunk&, const AdamConstants<double>&, double weight, bool stream);
};

const Kernels* default_kernels();
const Kernels* avx2_kernels();    // null where this compiler or system has no such branch
const Kernels* avx512_kernels();

// The widest set this machine runs, or the one that SAM_FUSED_CPU_CAPABILITY (default, avx2, avx512) names if it can run it.
const Kernels& kernels();

}  // namespace sam_fused::cpu
