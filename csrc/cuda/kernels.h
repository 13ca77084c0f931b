// The CUDA kernels: one function an op. No torch here: nvcc compiles what is behind them.
//
// Every function enqueues its launches on the stream that it is given and returns; none waits, and none allocates. A
// failed launch throws std::runtime_error. Scalars are addresses on the device, which the kernels read when they run.
#pragma once

#include <cstdint>

#include "../layout.h"
#include "../random.h"

#include <declared.h>  // made by generate.py, of what stands above

namespace lets::cuda {

constexpr int kLists = 6;
constexpr int kStart = kLists - 1;

// One run as the kernels see it: the address of its first element in each list of the op, in the op's order; null where
// the op was called without. Where no list needs the last slot, it is a number: the position of the run's first element
// in its bucket.
struct Run {
  char* address[kLists];
  int64_t numel;
};

// Sums of a reduction: the total stands first, the slots that the blocks write their own sums to behind it. Of several
// sums all totals stand first.
constexpr int kSlots = 1024;
constexpr int64_t kSumElements = 1 + kSlots;

// Makes the device current for the launches that follow on this thread.
void select(int device);

// Hidden: a kernel that is missing is then an error of the linker, which names it.
#define LETS_DECLARE(op, result)                               \
  [[gnu::visibility("hidden")]] void op(const launch_of::op&); \
  inline void enqueue(const launch_of::op& c) { op(c); }
LETS_OPS(LETS_DECLARE)
#undef LETS_DECLARE

// *flag = value.
void set(int64_t* flag, int64_t value, void* stream);
// Counts one more where the gate is open.
void advance(int64_t* counter, const double* gate, void* stream);
// *finite = 1 if all values are finite, else 0, and then *skipped counts one more.
void all_finite(const double* const* values, int64_t count, double* finite, int64_t* skipped, void* stream);

}  // namespace lets::cuda
