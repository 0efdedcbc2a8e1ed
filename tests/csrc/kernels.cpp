// The tables of CPU kernels behind a C interface, for ctypes: every compilation that this library holds, in one process.
#include "cpu/kernels.h"

using namespace sam_fused;
using namespace sam_fused::cpu;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

bool runs_here(int which) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return which == 0 || (which == 1 ? avx2 : avx512);
#else
  return which == 0;
#endif
}

const TensorRow& row_of(const int64_t* words) { return *reinterpret_cast<const TensorRow*>(words); }

}  // namespace

// Null where this library has no such compilation or this machine cannot run it.
EXPORT const Kernels* table(int which) {
  const Kernels* tables[] = {default_kernels(), avx2_kernels(), avx512_kernels()};
  return runs_here(which) ? tables[which] : nullptr;
}
EXPORT const char* table_name(const Kernels* k) { return k->name; }
EXPORT const char* chosen_name() { return kernels().name; }

// What a micro-batch weighs, where a row has an accumulator.
constexpr double kWeightOfMicroBatch = 0.3;

EXPORT void sum_of_squares(const Kernels* k, const int64_t* row, int64_t begin, int64_t count, double inv_scale, double* out) {
  SumOfSquares slot;
  k->sum_of_squares(row_of(row), Chunk{0, begin, count}, kWeightOfMicroBatch, inv_scale, &slot);
  out[0] = slot.small, out[1] = slot.middle, out[2] = slot.big;
}
EXPORT void perturb(const Kernels* k, const int64_t* row, int64_t begin, int64_t count, double c, int move, int backup_exists,
                    int stream) {
  k->perturb(row_of(row), Chunk{0, begin, count}, PerturbConstants{c, move != 0, backup_exists != 0, stream != 0});
}
EXPORT void restore(const Kernels* k, const int64_t* row, int64_t begin, int64_t count, int stream) {
  k->restore(row_of(row), Chunk{0, begin, count}, stream != 0);
}
EXPORT void accumulate(const Kernels* k, const int64_t* row, int64_t begin, int64_t count, int fresh, int stream) {
  k->accumulate(row_of(row), Chunk{0, begin, count}, AccumulateConstants{kWeightOfMicroBatch, fresh != 0, stream != 0});
}
EXPORT void sgd(const Kernels* k, const int64_t* row, int64_t begin, int64_t count, const double* c, int nesterov, int stream) {
  const SgdConstants<double> constants{c[0], c[1], c[2], c[3], c[4], c[1] != 0, c[3] != 0, nesterov != 0};
  k->sgd(row_of(row), Chunk{0, begin, count}, constants, kWeightOfMicroBatch, stream != 0);
}
EXPORT void adam(const Kernels* k, const int64_t* row, int64_t begin, int64_t count, const double* c, int decoupled, int amsgrad,
                 int stream) {
  const AdamConstants<double> constants{c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8],
                                        c[4] != 0 && !decoupled, amsgrad != 0};
  k->adam(row_of(row), Chunk{0, begin, count}, constants, kWeightOfMicroBatch, stream != 0);
}
