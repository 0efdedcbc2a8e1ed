// Stacks that take turns on one host thread: what a thread of a CUDA block is while it runs on the CPU.
//
// The switch is written by hand where it can be (x86-64): swapcontext makes a system call per switch, and a block switches
// thousands of times. Elsewhere, or with SAM_EMULATION_UCONTEXT defined, ucontext serves.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#if !defined(__x86_64__) && !defined(SAM_EMULATION_UCONTEXT)
#define SAM_EMULATION_UCONTEXT
#endif
#if defined(SAM_EMULATION_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define SAM_EMULATION_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SAM_EMULATION_ASAN
#endif
#endif
#if defined(SAM_EMULATION_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace sam_emulation {

// Memory for one stack, with a page below it that may not be touched: an overflow ends the program instead of writing into a
// neighbour. Pages cost memory only once they are used, so the size can allow for a kernel's 32 KiB of by-value arguments.
class Stack {
 public:
  static constexpr size_t kBytes = 256 * 1024;

  Stack() : guard_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    base_ = mmap(nullptr, guard_ + kBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (base_ == MAP_FAILED) throw std::runtime_error("expected memory for a fiber's stack, got none: use smaller blocks");
    mprotect(base_, guard_, PROT_NONE);
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  ~Stack() {
#if defined(SAM_EMULATION_ASAN)
    // Frames that were left without returning have poisoned it, and the next mapping may get the same addresses.
    ASAN_UNPOISON_MEMORY_REGION(bottom(), kBytes);
#endif
    munmap(base_, guard_ + kBytes);
  }

  char* bottom() const { return static_cast<char*>(base_) + guard_; }
  char* top() const { return bottom() + kBytes; }

 private:
  size_t guard_;
  void* base_;
};

// Where a suspended stack goes on.
#if defined(SAM_EMULATION_UCONTEXT)

struct Context {
  ucontext_t registers;
};
inline void prepare(Context& context, const Stack& stack, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack.bottom();
  context.registers.uc_stack.ss_size = Stack::kBytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
}
inline void switch_context(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }

#else

struct Context {
  void* stack_pointer;
};

// Pushes what the System V ABI has a callee keep, exchanges the stack pointers, pops. The floating-point control words are the
// same in every fiber: kernels leave them alone.
__attribute__((naked, noinline, no_sanitize("address", "undefined"))) inline void exchange_stacks(void** /*save*/,
                                                                                                  void* /*to*/) {
  __asm__(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\t"
      "ret");
}

inline void prepare(Context& context, const Stack& stack, void (*entry)()) {
  // As exchange_stacks leaves it: six registers, where to return to, and a null return address that ends a backtrace.
  constexpr int kRegisters = 6;
  auto* top = reinterpret_cast<uintptr_t*>(stack.top());
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < kRegisters; ++i) *--top = 0;
  context.stack_pointer = top;
}
inline void switch_context(Context& from, Context& to) { exchange_stacks(&from.stack_pointer, to.stack_pointer); }

#endif

// Runs `body` again every time it is resumed after having returned, so that a stack serves block after block.
class Fiber {
 public:
  explicit Fiber(void (*body)()) : body_(body) { prepare(context_, stack_, &Fiber::enter); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // From the host's stack: goes on in the fiber and comes back when it suspends.
  void resume() {
    running() = this;
    before_switch(&host_fake_stack_, stack_.bottom(), Stack::kBytes);
    switch_context(host_, context_);
    after_switch(host_fake_stack_, nullptr, nullptr);
    running() = nullptr;
  }

  // From the fiber's stack.
  void suspend() {
    before_switch(&fake_stack_, host_bottom_, host_size_);
    switch_context(context_, host_);
    after_switch(fake_stack_, &host_bottom_, &host_size_);
  }

 private:
  static Fiber*& running() {
    static thread_local Fiber* fiber = nullptr;
    return fiber;
  }

  static void enter() {
    Fiber& self = *running();
    self.after_switch(self.fake_stack_, &self.host_bottom_, &self.host_size_);
    for (;;) {
      self.body_();
      self.suspend();
    }
  }

  // AddressSanitizer has to know which stack it is on.
  void before_switch([[maybe_unused]] void** fake, [[maybe_unused]] const void* bottom, [[maybe_unused]] size_t size) {
#if defined(SAM_EMULATION_ASAN)
    __sanitizer_start_switch_fiber(fake, bottom, size);
#endif
  }
  void after_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** bottom, [[maybe_unused]] size_t* size) {
#if defined(SAM_EMULATION_ASAN)
    __sanitizer_finish_switch_fiber(fake, bottom, size);
#endif
  }

  Stack stack_;
  Context context_{}, host_{};
  void (*body_)();
  void* fake_stack_ = nullptr;
  void* host_fake_stack_ = nullptr;
  const void* host_bottom_ = nullptr;
  size_t host_size_ = 0;
};

}  // namespace sam_emulation
