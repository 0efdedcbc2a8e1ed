// What every compilation of kernels.inl includes before the target options change. Standard headers must come first: an
// inline function of theirs compiled for AVX-512 could otherwise be the copy that the linker keeps for everybody.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"
#include "squares.h"
#include "storage.h"

// x86-64 Linux with g++ or clang: several instruction sets in one library. Anywhere else, and with
// -DSAM_FUSED_NO_MULTIVERSION, the default compilation alone.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(SAM_FUSED_NO_MULTIVERSION)
#define SAM_FUSED_MULTIVERSION 1
#else
#define SAM_FUSED_MULTIVERSION 0
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define SAM_FUSED_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SAM_FUSED_BEGIN_TARGET(isa) \
  SAM_FUSED_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define SAM_FUSED_END_TARGET _Pragma("clang attribute pop")
// The loop's iterations are independent: an output may be an input's own memory, never a neighbour's.
#define SAM_FUSED_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define SAM_FUSED_BEGIN_TARGET(isa) _Pragma("GCC push_options") SAM_FUSED_PRAGMA(GCC target(isa))
#define SAM_FUSED_END_TARGET _Pragma("GCC pop_options")
#define SAM_FUSED_INDEPENDENT _Pragma("GCC ivdep")
#endif
