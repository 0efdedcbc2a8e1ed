// One block: its threads as fibers, its barriers, its shared memory.
//
// Stricter than CUDA where CUDA leaves things undefined or allows what depends on the hardware. A block barrier wants every
// thread of the block, at the same place in the source; a thread that has returned does not count as arrived. A warp operation
// wants every lane that its mask names, with the same mask, at the same place, and a mask may not name lanes that the block
// does not have.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fibers.h"
#include "schedule.h"
#include "shared_memory.h"
#include "types.h"

namespace sam_emulation {

inline constexpr uint32_t kLanes = 32;

// A barrier or a warp operation as it stands in the source.
struct Place {
  const char* operation;
  std::source_location where;

  bool operator==(const Place& other) const {
    // Instances of one template differ in their function's name.
    return where.line() == other.where.line() && where.column() == other.where.column() &&
           same(where.file_name(), other.where.file_name()) && same(where.function_name(), other.where.function_name());
  }
  static bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

  std::string text() const {
    const std::string file = where.file_name();
    return std::string(operation) + " (" + file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line()) + ")";
  }
};

struct Thread {
  Fiber* fiber = nullptr;
  uint3 index{};
  bool returned = false;
  // A warp operation's operands and results.
  uint64_t sent = 0, received = 0;
  uint32_t source = 0, votes = 0;
  // A block barrier's result: threads whose predicate holds.
  int holding = 0;
};

// Lanes of a warp that wait for each other.
struct Meeting {
  uint32_t warp, mask, arrived;
  Place place;
};

class Block {
 public:
  using Fibers = std::vector<std::unique_ptr<Fiber>>;

  Block(dim3 size, const Orders& orders, Random& random, Fibers& fibers, void (*kernel)(void*), void* arguments)
      : orders_(orders),
        threads_(size_t{size.x} * size.y * size.z),
        schedule_(static_cast<uint32_t>(threads_.size()), orders.threads, random),
        kernel_(kernel),
        arguments_(arguments) {
    while (fibers.size() < threads_.size()) fibers.push_back(std::make_unique<Fiber>(&Block::run_thread));
    for (uint32_t i = 0; i < threads_.size(); ++i) {
      threads_[i].fiber = fibers[i].get();
      threads_[i].index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    }
  }

  // Throws what a thread threw, or why the block cannot go on; then the fibers are in the middle of something.
  void run() {
    shared_.refill();
    for (Thread& thread : threads_) thread.returned = false;
    schedule_.all_ready();
    for (size_t left = threads_.size(); left > 0;) {
      const int64_t next = schedule_.next();
      if (next < 0) throw std::runtime_error(stuck());
      current_ = static_cast<uint32_t>(next);
      threadIdx = threads_[current_].index;
      threads_[current_].fiber->resume();
      if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
      left -= threads_[current_].returned;
    }
  }

  // ---- called by threads ----

  // Number of threads whose predicate holds.
  int block_barrier(Place place, bool predicate) {
    if (arrived_ > 0 && !(place == barrier_))
      fail(place.text() + " in " + text() + ": expected all threads at one barrier, got " + std::to_string(arrived_) +
           " at " + barrier_.text() + ": move the barrier out of the branch");
    barrier_ = place;
    holding_ += predicate;
    if (++arrived_ == threads_.size()) {
      for (Thread& thread : threads_) thread.holding = holding_;
      arrived_ = 0;
      holding_ = 0;
      schedule_.all_ready();
    }
    // The last to arrive gives way too: who goes on first is the order's choice.
    return suspend().holding;
  }

  // Hands `value` to the lanes of `mask` and takes the one of `source`, a lane. A source that does not take part gives 0xff
  // bytes: CUDA says undefined.
  const Thread& warp_operation(Place place, uint32_t mask, uint64_t value, uint32_t source) {
    const uint32_t lane = current_ % kLanes, bit = 1u << lane;
    check_mask(place, mask, bit);
    threads_[current_].sent = value;
    threads_[current_].source = source;
    Meeting& meeting = join(place, mask);
    meeting.arrived |= bit;
    if (meeting.arrived == mask) {
      part(meeting);
      meeting = meetings_.back();
      meetings_.pop_back();
    }
    return suspend();
  }

  uint32_t lane() const { return current_ % kLanes; }

  void* shared_memory(const void* key, size_t size, size_t align) {
    void* object = shared_.get(key, size, align);
    if (object == nullptr)
      fail("shared memory of " + text() + ": expected at most " + std::to_string(SharedMemory::kLimit) +
           " bytes, got more with this object of " + std::to_string(size) + ": use smaller objects");
    return object;
  }

  // Ends the launch. Not a C++ exception through the kernel: kernels may be noexcept.
  [[noreturn]] void fail(const std::string& message) {
    failure_ = std::make_exception_ptr(std::runtime_error(message + " (" + orders_.text() + ")"));
    threads_[current_].fiber->suspend();
    std::terminate();  // nobody resumes it
  }

 private:
  static void run_thread();

  Thread& suspend() {
    const uint32_t self = current_;
    threads_[self].fiber->suspend();
    return threads_[self];
  }

  uint32_t lanes_of(uint32_t warp) const {
    const size_t count = threads_.size() - size_t{warp} * kLanes;
    return count >= kLanes ? ~0u : (1u << count) - 1;
  }

  void check_mask(const Place& place, uint32_t mask, uint32_t bit) {
    const uint32_t warp = current_ / kLanes, exist = lanes_of(warp);
    const std::string where = place.text() + " in warp " + std::to_string(warp) + " of " + text();
    if (!(mask & bit))
      fail(where + ": expected a mask that names the calling lane " + std::to_string(lane()) + ", got " + hexadecimal(mask));
    if (mask & ~exist)
      fail(where + ": expected a mask of lanes in " + hexadecimal(exist) + ", the ones there are, got " + hexadecimal(mask));
  }

  Meeting& join(const Place& place, uint32_t mask) {
    const uint32_t warp = current_ / kLanes;
    for (Meeting& meeting : meetings_) {
      if (meeting.warp != warp) continue;
      if (meeting.mask == mask && meeting.place == place) return meeting;
      // Lanes that wait for this one while it waits for them. Others may come here later, so theirs is no fault yet.
      if (!(meeting.arrived & mask) || !(meeting.mask & 1u << lane())) continue;
      fail(place.text() + " in warp " + std::to_string(warp) + " of " + text() + ": expected the lanes of " +
           hexadecimal(mask) + " at one operation, got " + std::to_string(std::popcount(meeting.arrived)) + " at " +
           meeting.place.text() + " with mask " + hexadecimal(meeting.mask) + ": move it out of the branch");
    }
    meetings_.push_back({warp, mask, 0, place});
    return meetings_.back();
  }

  // Every lane has arrived: each gets what it asked for and can go on.
  void part(const Meeting& meeting) {
    Thread* lanes = &threads_[size_t{meeting.warp} * kLanes];
    uint32_t votes = 0;
    for (uint32_t lane = 0; lane < kLanes; ++lane)
      if (meeting.mask & 1u << lane && lanes[lane].sent != 0) votes |= 1u << lane;
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      if (!(meeting.mask & 1u << lane)) continue;
      const uint32_t source = lanes[lane].source;
      lanes[lane].received = source < kLanes && meeting.mask & 1u << source ? lanes[source].sent : ~uint64_t{0};
      lanes[lane].votes = votes;
      schedule_.ready(meeting.warp * kLanes + lane);
    }
  }

  static std::string hexadecimal(uint32_t mask) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", mask);
    return text;
  }

  std::string text() const {
    return "block (" + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," + std::to_string(blockIdx.z) +
           ") of " + std::to_string(threads_.size()) + " threads";
  }

  // Who waits where, when nobody can go on.
  std::string stuck() const {
    std::string message = "deadlock in " + text() + ": ";
    if (arrived_ > 0)
      message += "expected all " + std::to_string(threads_.size()) + " threads at " + barrier_.text() + ", got " +
                 std::to_string(arrived_) + ", ";
    for (const Meeting& meeting : meetings_)
      message += "expected the lanes " + hexadecimal(meeting.mask) + " of warp " + std::to_string(meeting.warp) + " at " +
                 meeting.place.text() + ", got " + hexadecimal(meeting.arrived) + ", ";
    const auto returned = std::count_if(threads_.begin(), threads_.end(), [](const Thread& t) { return t.returned; });
    return message + "and " + std::to_string(returned) +
           " that returned: let every thread that is waited for reach the same barrier (" + orders_.text() + ")";
  }

  Orders orders_;
  std::vector<Thread> threads_;
  Schedule schedule_;
  SharedMemory shared_;
  void (*kernel_)(void*);
  void* arguments_;
  uint32_t current_ = 0;
  std::exception_ptr failure_;

  Place barrier_{};  // where `arrived_` threads wait
  uint32_t arrived_ = 0;
  int holding_ = 0;
  std::vector<Meeting> meetings_;
};

inline thread_local constinit Block* running_block = nullptr;

inline Block& here(const char* what) {
  if (running_block == nullptr)
    throw std::runtime_error(std::string(what) + ": expected to be called by a kernel, got a call from the host");
  return *running_block;
}

inline void Block::run_thread() {
  Block& block = *running_block;
  try {
    block.kernel_(block.arguments_);
  } catch (...) {
    block.failure_ = std::current_exception();
  }
  block.threads_[block.current_].returned = true;
}

}  // namespace sam_emulation
