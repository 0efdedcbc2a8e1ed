// Lists of tensors -> chunks -> pieces of work. Pure C++: no torch, no threads, tested alone.
//
// A chunk is a run of at most kChunk elements of one tensor. Chunks are numbered through all tensors, so chunk c owns slot c
// of a reduction whatever thread runs it: that is what makes the norm the same for every thread count.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "element.h"

namespace sam_fused {

// The roles a tensor can have in an operation. A row has one address and one dtype code for each.
enum Role : int { kWeight, kBackup, kGrad, kState0, kState1, kState2, kStep, kAccumulator, kRoles };

// What ops/dtypes.py calls a dtype's code; the two lists are compared by a test.
enum class DType : uint8_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// How a perturbation is scaled per element: T = 1 or T = |w|.
enum class Scaling : int64_t { kNone = 0, kAbsWeight = 1 };

// One tensor of every list. Python builds the same thing as a row of an int64 table (ops/prepared.py), hence the fixed
// layout and the absence of padding.
struct TensorRow {
  int64_t numel;
  int64_t group;    // row of the hyper-parameter table
  int64_t scaling;  // Scaling
  int64_t first;    // 1: the base optimizer creates this tensor's momentum in this step
  uint64_t dtypes;  // one byte per role
  void* address[kRoles];

  SAM_FUSED_HD DType dtype(Role role) const { return static_cast<DType>((dtypes >> (8 * role)) & 0xff); }
  void set_dtype(Role role, DType dtype) {
    dtypes = (dtypes & ~(uint64_t{0xff} << (8 * role))) | (uint64_t(dtype) << (8 * role));
  }
};

struct Rows {
  TensorRow* data;
  int64_t count;
};

inline constexpr int64_t kRowWords = 5 + kRoles;
static_assert(sizeof(TensorRow) == kRowWords * sizeof(int64_t), "Python writes rows of int64");

// 32 Ki elements: 128 KiB of fp32 per operand, so the operands of one chunk stay inside a 1 MiB second-level cache, and a
// 25 M parameter model still has several hundred chunks to balance over the threads.
inline constexpr int64_t kChunk = 32768;

// A tensor costs something however small it is; counting it as this many elements keeps pieces of many small tensors even.
inline constexpr int64_t kTensorOverhead = 256;

struct Chunk {
  int64_t tensor;
  int64_t begin;  // first element
  int64_t count;  // elements, > 0
};

// Which chunk is where. Empty tensors own no chunk.
class Plan {
 public:
  template <class NumelOf>
  Plan(int64_t tensors, NumelOf numel_of, int64_t chunk = kChunk) : chunk_(chunk) {
    first_chunk_.reserve(tensors + 1);
    work_.reserve(tensors + 1);
    int64_t chunks = 0, work = 0;
    for (int64_t t = 0; t < tensors; ++t) {
      first_chunk_.push_back(chunks);
      work_.push_back(work);
      const int64_t numel = numel_of(t);
      // Not (numel + chunk - 1) / chunk: the sum may overflow for sizes near 2^63.
      chunks += numel / chunk_ + (numel % chunk_ != 0);
      work += numel == 0 ? 0 : numel + kTensorOverhead;
      elements_ += numel;
    }
    first_chunk_.push_back(chunks);
    work_.push_back(work);
    numels_.reserve(tensors);
    for (int64_t t = 0; t < tensors; ++t) numels_.push_back(numel_of(t));
  }

  int64_t tensors() const { return static_cast<int64_t>(numels_.size()); }
  int64_t chunks() const { return first_chunk_.back(); }
  int64_t elements() const { return elements_; }
  int64_t first_chunk(int64_t tensor) const { return first_chunk_[tensor]; }  // chunks() for the one past the last

  // The tensor that owns chunk c: the last one whose first chunk is <= c and that is not empty.
  int64_t tensor_of(int64_t c) const {
    return std::upper_bound(first_chunk_.begin(), first_chunk_.end(), c) - first_chunk_.begin() - 1;
  }

  Chunk chunk(int64_t c) const { return chunk_in(tensor_of(c), c); }

  Chunk chunk_in(int64_t tensor, int64_t c) const {
    const int64_t begin = (c - first_chunk_[tensor]) * chunk_;
    return {tensor, begin, std::min(chunk_, numels_[tensor] - begin)};
  }

  // Boundaries of `pieces` runs of consecutive chunks holding about the same work: pieces + 1 ascending chunk numbers from 0
  // to chunks(). A run may be empty.
  std::vector<int64_t> split(int64_t pieces) const {
    std::vector<int64_t> bounds(pieces + 1, chunks());
    bounds[0] = 0;
    const int64_t total = work_.back();
    for (int64_t p = 1; p < pieces; ++p) {
      const int64_t target = total / pieces * p + total % pieces * p / pieces;
      const int64_t t = std::upper_bound(work_.begin(), work_.end(), target) - work_.begin() - 1;
      if (t >= tensors()) continue;
      const int64_t inside = std::min(target - work_[t], numels_[t]);
      const int64_t c = first_chunk_[t] + inside / chunk_;
      bounds[p] = std::max(bounds[p - 1], std::min(c, chunks()));
    }
    return bounds;
  }

  // Calls f(chunk number, Chunk) for [begin, end), one search for the whole run.
  template <class F>
  void for_each(int64_t begin, int64_t end, F f) const {
    if (begin >= end) return;
    int64_t tensor = tensor_of(begin);
    for (int64_t c = begin; c < end; ++c) {
      while (first_chunk_[tensor + 1] <= c) ++tensor;
      f(c, chunk_in(tensor, c));
    }
  }

 private:
  int64_t chunk_;
  int64_t elements_ = 0;
  std::vector<int64_t> first_chunk_;  // [tensors + 1] prefix sums of chunks
  std::vector<int64_t> work_;         // [tensors + 1] prefix sums of elements + overhead
  std::vector<int64_t> numels_;       // [tensors]
};

}  // namespace sam_fused
