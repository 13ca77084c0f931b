// The CUDA kernels, as functions with one entry an op. No torch here: nvcc compiles what is behind them.
//
// Every function enqueues its launches on `stream` and returns; none waits, and none allocates. A failed launch throws
// std::runtime_error. Scalars are addresses on the device, which the kernels read when they run.
#pragma once

#include <cstdint>

#include "../layout.h"
#include "../math.h"

namespace lets::cuda {

constexpr int kLists = 6;
constexpr int kStart = kLists - 1;

// One run as the kernels see it: the address of its first element in each list of the op, in the op's order. Where no
// list needs the last slot, it is a number: the position of the run's first element in its bucket.
struct Row {
  char* address[kLists];
  int64_t numel;
  int64_t row_length, row_count;  // as in the run table
  const void* norms;              // the run's filter norms, or null
};

// Sums of a reduction: the total stands first, the slots that the blocks write their own sums to behind it. Of several
// sums all totals stand first.
constexpr int kSlots = 1024;
constexpr int64_t kSumElements = 1 + kSlots;

// Makes the device current for the launches that follow on this thread.
void select(int device);

// Rows: v, theta (theta null where T = 1 or filters give it).
void norm(Dtype, const Row* rows, int64_t count, double xi, double q, double* sums, void* stream);
// Rows: theta; the address of the first filter norm, which is written, is `norms`.
void filter_norms(Dtype, const Row* rows, int64_t count, void* stream);
// Rows: theta, v (null: it stands in saved), saved.
void perturb(Dtype, const Row* rows, int64_t count, double xi, double q, const double* total, const double* rho,
             int64_t* dirty, void* stream);
// Rows: theta, saved.
void restore(Dtype, const Row* rows, int64_t count, int64_t* dirty, void* stream);
// Rows: theta, g, m (or null), saved.
void sgd(Dtype, const Row* rows, int64_t count, const SgdOptions&, const double* gate, int64_t* dirty, void* stream);
// Rows: theta, g, m, v, saved, the run's step count (float).
void adam(Dtype, const Row* rows, int64_t count, const AdamOptions&, const double* gate, int64_t* dirty, void* stream);
// Rows: theta, g, m, s, saved.
void bsam(Dtype, const Row* rows, int64_t count, double lr, double beta1, double weight_decay, const double* gate,
          int64_t* dirty, void* stream);
// Rows: val, train (or null), g_hat, v, theta (or null).
void rho_diagonal(Dtype, const Row* rows, int64_t count, double xi, double q, double* sums, void* stream);
// Rows: val, train (or null), g_hat, g.
void rho_secant(Dtype, const Row* rows, int64_t count, double* sums, void* stream);
// Rows: x, y. Three sums: x·x, x·y, y·y.
void dots(Dtype, const Row* rows, int64_t count, double* sums, void* stream);
// Rows: g, theta, saved. The same of g and what theta has moved from saved.
void displacement_dots(Dtype, const Row* rows, int64_t count, double* sums, void* stream);
// Rows: out, x, y.
void combine(Dtype, const Row* rows, int64_t count, const double* coefficients, const double* gate, void* stream);
// Rows: m, x, out (or null).
void average(Dtype, const Row* rows, int64_t count, double decay, double a, double b, int64_t* updates,
             const double* gate, double* sums, void* stream);
// Rows: out, s, g.
void posterior_ascent(Dtype, const Row* rows, int64_t count, double beta2, double damping, const double* gate,
                      void* stream);
// Rows: out, v (or null), s (or null); the filter norms where the row has any.
void noise(Dtype, const Row* rows, int64_t count, const int64_t* random, uint32_t draws, double a, double std,
           double* sums, void* stream);
// Rows: out, v, mask (null: draw one).
void masked(Dtype, const Row* rows, int64_t count, const int64_t* random, uint32_t draws, double share, double* sums,
            void* stream);
// Rows: v (or null), mask.
void count_above(Dtype, const Row* rows, int64_t count, const int64_t* threshold, const int64_t* random, uint32_t draws,
                 int64_t member, double* sums, void* stream);
void select_above(Dtype, const Row* rows, int64_t count, const int64_t* threshold, const int64_t* random,
                  uint32_t draws, int64_t member, uint8_t value, void* stream);
// Rows: v.
void largest(Dtype, const Row* rows, int64_t count, double* sums, void* stream);
// Rows: out, v.
void peaks(Dtype, const Row* rows, int64_t count, const double* largest, double* sums, void* stream);
// *flag = value.
void set(int64_t* flag, int64_t value, void* stream);
// Counts one more where the gate is open.
void advance(int64_t* counter, const double* gate, void* stream);
// *finite = 1 if all values are finite, else 0, and then *skipped counts one more.
void all_finite(const double* const* values, int64_t count, double* finite, int64_t* skipped, void* stream);

}  // namespace lets::cuda
