// In which order the threads of a block, and the blocks of a grid, are run. A right kernel's results depend on neither.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace sam_emulation {

enum class Order : int { kAscending, kDescending, kRandom };

inline const char* name_of(Order order) {
  constexpr const char* kNames[] = {"ascending", "descending", "random"};
  return kNames[static_cast<int>(order)];
}

// The orders of the launches to come. `seed` and the number of launches since it was set make every random order; the same
// seed gives the same orders again.
struct Orders {
  Order threads = Order::kAscending;
  Order blocks = Order::kAscending;
  uint64_t seed = 0;

  std::string text() const {
    return std::string("threads ") + name_of(threads) + ", blocks " + name_of(blocks) + ", seed " + std::to_string(seed);
  }
};

inline Order order_from_environment(const char* variable) {
  const char* value = std::getenv(variable);
  if (value == nullptr) return Order::kAscending;
  for (Order order : {Order::kAscending, Order::kDescending, Order::kRandom})
    if (std::string(value) == name_of(order)) return order;
  throw std::runtime_error(std::string(variable) + ": expected ascending, descending or random, got '" + value + "'");
}

// SAM_EMULATION_THREADS, SAM_EMULATION_BLOCKS and SAM_EMULATION_SEED: for a program that cannot be told otherwise.
inline Orders orders_from_environment() {
  const char* seed = std::getenv("SAM_EMULATION_SEED");
  return {order_from_environment("SAM_EMULATION_THREADS"), order_from_environment("SAM_EMULATION_BLOCKS"),
          seed == nullptr ? 0 : std::strtoull(seed, nullptr, 10)};
}

using Random = std::mt19937_64;

inline void arrange(std::vector<uint32_t>& items, Order order, Random& random) {
  std::iota(items.begin(), items.end(), 0u);
  if (order == Order::kDescending) std::reverse(items.begin(), items.end());
  if (order == Order::kRandom) std::shuffle(items.begin(), items.end(), random);
}

// Which thread runs next: always the first in the order that can. So the first warp gets as far ahead of the last as the
// barriers let it, which is where a missing barrier shows; taking turns would hide it, since warps would keep step.
class Schedule {
 public:
  Schedule(uint32_t threads, Order order, Random& random)
      : order_(order), random_(random), ranked_(threads), rank_(threads), ready_((threads + 63) / 64) {
    rank();
  }

  // Every thread can run. Called at the start of a block and whenever its barrier lets all go.
  void all_ready() {
    if (order_ == Order::kRandom) rank();
    for (uint32_t thread = 0; thread < ranked_.size(); ++thread) ready(thread);
  }

  void ready(uint32_t thread) { ready_[rank_[thread] / 64] |= uint64_t{1} << rank_[thread] % 64; }

  // Takes the next thread out; -1 where none can run.
  int64_t next() {
    for (size_t word = 0; word < ready_.size(); ++word) {
      if (ready_[word] == 0) continue;
      const int bit = std::countr_zero(ready_[word]);
      ready_[word] &= ready_[word] - 1;
      return ranked_[word * 64 + bit];
    }
    return -1;
  }

 private:
  void rank() {
    arrange(ranked_, order_, random_);
    for (uint32_t rank = 0; rank < ranked_.size(); ++rank) rank_[ranked_[rank]] = rank;
  }

  Order order_;
  Random& random_;
  std::vector<uint32_t> ranked_;  // thread of each rank
  std::vector<uint32_t> rank_;    // rank of each thread
  std::vector<uint64_t> ready_;   // one bit per rank
};

}  // namespace sam_emulation
