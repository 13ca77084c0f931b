// Runs CUDA kernels on the CPU: every thread of a block is a fiber, __syncthreads hands over to the next one.
//
// Blocks run one after another in an order that a seed shuffles, and so do the threads of a block between two barriers:
// a result that depends on either is a race. A block whose threads do not all reach the same barrier is an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define LETS_DEVICE static inline
#define LETS_KERNEL static void
#define LETS_KERNEL_FOR(blocks) static void
#define LETS_SHARED static
#define LETS_PARAMETER const

namespace lets::cuda {

struct Dim {
  unsigned x;
};
inline Dim threadIdx, blockIdx, gridDim;

class Emulator {
 public:
  static Emulator& instance() {
    static Emulator emulator;
    return emulator;
  }

  void run(int64_t blocks, int threads, const std::function<void()>& body) {
    if (blocks < 1 || blocks > 0x7fffffff || threads < 1 || threads > 1024)
      throw std::runtime_error("emulator: a launch of " + std::to_string(blocks) + " blocks of " +
                               std::to_string(threads) + " threads");
    ++launches_;
    body_ = &body;
    gridDim = {unsigned(blocks)};
    std::vector<int64_t> order(static_cast<size_t>(blocks));
    std::iota(order.begin(), order.end(), int64_t(0));
    std::shuffle(order.begin(), order.end(), random_);
    for (int64_t block : order) {
      blockIdx = {unsigned(block)};
      run_block(threads);
    }
  }

  int64_t launches() const { return launches_; }

  void barrier() {
    if (_setjmp(fibers_[current_].at) == 0) _longjmp(scheduler_, 1);
  }

 private:
  static constexpr size_t kStack = size_t(1) << 17;
  static constexpr size_t kApart = 192;  // of the ends of stacks, which else fall into the same sets of the caches
  // Runs one thread after another: making one (makecontext) asks the kernel for the signal mask, and a jump does not.
  struct Fiber {
    jmp_buf at;  // where it goes on
    std::vector<char> stack = std::vector<char>(kStack);
    bool begun = false, done = false;
  };

  void run_block(int threads) {
    if (fibers_.size() < size_t(threads)) fibers_.resize(size_t(threads));
    for (int t = 0; t < threads; ++t) fibers_[size_t(t)].done = false;
    std::vector<size_t> order(static_cast<size_t>(threads));
    std::iota(order.begin(), order.end(), size_t(0));
    for (int left = threads; left > 0;) {
      std::shuffle(order.begin(), order.end(), random_);
      int finished = 0;
      for (size_t t : order) {
        current_ = t;
        threadIdx = {unsigned(t)};
        switch_to(fibers_[t]);
        finished += fibers_[t].done;
      }
      if (finished != 0 && finished != left) {
        fibers_.clear();  // those that wait will never go on
        throw std::runtime_error("emulator: some threads of a block wait at a barrier, others have returned");
      }
      left -= finished;
    }
  }

  // A function of its own: its caller's variables survive the jump back.
  __attribute__((noinline)) void switch_to(Fiber& fiber) {
    if (_setjmp(scheduler_) == 0) go_on(fiber);
  }

  void go_on(Fiber& fiber) {
    if (fiber.begun) _longjmp(fiber.at, 1);
    fiber.begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.data();
    context.uc_stack.ss_size = kStack - current_ % 256 * kApart;
    context.uc_link = nullptr;
    makecontext(&context, &Emulator::enter, 0);
    setcontext(&context);
  }

  static void enter() {
    Emulator& e = instance();
    for (;;) {
      (*e.body_)();
      e.fibers_[e.current_].done = true;
      e.barrier();
    }
  }

  std::vector<Fiber> fibers_;
  jmp_buf scheduler_;
  size_t current_ = 0;
  int64_t launches_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::mt19937 random_{std::getenv("LETS_EMULATOR_SEED") ? unsigned(std::atoi(std::getenv("LETS_EMULATOR_SEED"))) : 0u};
};

inline void __syncthreads() { Emulator::instance().barrier(); }

inline void set_device(int) {}

template <class P>
P read_only(const P* from) {
  return *from;
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void*, const Parameters&... arguments) {
  Emulator::instance().run(blocks, threads, [&] { kernel(arguments...); });
}

}  // namespace lets::cuda
