// The CPU forms of the operations declared in sam_fused/ops/schema.py: list ops (door 1) and prepared ops (door 2).
// Arguments were checked in Python; what could still corrupt memory is checked again here.
#pragma once

#include <cstdint>
#include <tuple>

#include "operands.h"

namespace sam_fused::cpu {

#include "declarations.inl"

int64_t cpu_capability();  // 0 default, 1 avx2, 2 avx512
int64_t row_words();       // what Python's rows must be wide

}  // namespace sam_fused::cpu
