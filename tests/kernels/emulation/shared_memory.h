// A block's shared memory: objects on the heap, one per key, refilled with 0xff (NaN) before each block.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "fibers.h"

namespace sam_emulation {

class SharedMemory {
 public:
  static constexpr size_t kLimit = 48 * 1024;  // what a kernel may declare statically

  SharedMemory() = default;
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory() {
    for (const Object& object : objects_) std::free(object.allocation);
  }

  // The block's object of this key, size and alignment; null where all of them would be more than the limit.
  void* get(const void* key, size_t size, size_t align) {
    size_t total = size;
    for (const Object& object : objects_) {
      if (object.key == key && object.size == size && object.align == align) return object.address;
      total += object.size;
    }
    return total > kLimit ? nullptr : add(key, size, align);
  }

  void refill() {
    for (const Object& object : objects_) std::memset(object.address, 0xff, object.size);
  }

 private:
  struct Object {
    const void* key;
    size_t size, align;
    void* allocation;
    char* address;
  };

  // An allocation of its own, so that AddressSanitizer guards its end, and aligned to no more than was asked for (above 8), so
  // that wider accesses than the type allows are seen. What is skipped before it is poisoned and guards its start.
  void* add(const void* key, size_t size, size_t align) {
    const size_t skipped = std::max<size_t>(align, 8);
    void* allocation = nullptr;
    if (posix_memalign(&allocation, 2 * skipped, skipped + size) != 0) throw std::bad_alloc();
#if defined(SAM_EMULATION_ASAN)
    ASAN_POISON_MEMORY_REGION(allocation, skipped);
#endif
    objects_.push_back({key, size, align, allocation, static_cast<char*>(allocation) + skipped});
    std::memset(objects_.back().address, 0xff, size);
    return objects_.back().address;
  }

  std::vector<Object> objects_;
};

}  // namespace sam_emulation
