// Sums of squares over the whole range of every storage type. One file for g++ and nvcc.
//
// fp64 values are kept in three accumulators scaled by powers of two (after Blue, 1978, and Anderson, 2017), because their
// squares leave fp64's range; every other storage type's squares are exact in `middle`.
#pragma once

#include <cmath>

#include "element.h"

namespace sam_fused {

// Values beyond these have their squares kept in `big` and `small`.
inline constexpr double kBigValue = 0x1p400, kSmallValue = 0x1p-400;
// What those are multiplied with before they are squared, and 1 over it.
inline constexpr double kShrink = 0x1p-600, kGrow = 0x1p600;

struct SumOfSquares {
  double small = 0, middle = 0, big = 0;  // of x 2^600, x, x 2^-600
};

SAM_FUSED_HD void add_square(SumOfSquares& sum, double x) {
  const double size = ::fabs(x);
  if (size > kBigValue) sum.big += (x * kShrink) * (x * kShrink);
  else if (size < kSmallValue) sum.small += (x * kGrow) * (x * kGrow);
  else sum.middle += x * x;  // NaN too
}

SAM_FUSED_HD SumOfSquares operator+(const SumOfSquares& a, const SumOfSquares& b) {
  SumOfSquares sum;
  sum.small = a.small + b.small;
  sum.middle = a.middle + b.middle;
  sum.big = a.big + b.big;
  return sum;
}

SAM_FUSED_HD double norm_of(const SumOfSquares& total) {
  // A smaller accumulator matters only where the next larger one is empty or close.
  if (total.big != 0) return ::sqrt(total.big + total.middle * kShrink * kShrink) * kGrow;
  if (total.middle != 0) return ::sqrt(total.middle + total.small * kShrink * kShrink);
  return ::sqrt(total.small) * kShrink;
}

}  // namespace sam_fused
