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

// One run as the kernels see it: the address of its first element in each list of the op, in the op's order.
struct Row {
  char* address[kLists];
  int64_t numel;
  int64_t row_length, row_count;  // as in the run table
  const void* norms;              // the run's filter norms, or null
};

// Sums of a reduction: the total stands first, the slots that the blocks write their own sums to behind it.
constexpr int kSlots = 1024;
constexpr int64_t kSumElements = 1 + kSlots;

// Makes the device current for the launches that follow on this thread.
void select(int device);

// Rows: v, theta (theta null where T = 1 or filters give it).
void norm(Dtype, const Row* rows, int64_t count, double xi, double q, double* sums, void* stream);
// Rows: theta; the address of the first filter norm, which is written, is `norms`.
void filter_norms(Dtype, const Row* rows, int64_t count, void* stream);
// Rows: theta, v, saved.
void perturb(Dtype, const Row* rows, int64_t count, double xi, double q, const double* total, const double* rho,
             int64_t* dirty, void* stream);
// Rows: theta, saved.
void restore(Dtype, const Row* rows, int64_t count, int64_t* dirty, void* stream);
// Rows: theta, g, m (or null), saved.
void sgd(Dtype, const Row* rows, int64_t count, const SgdOptions&, const double* gate, int64_t* dirty, void* stream);
// Rows: theta, g, m, v, saved, the run's step count (float).
void adam(Dtype, const Row* rows, int64_t count, const AdamOptions&, const double* gate, int64_t* dirty, void* stream);
// Rows: val, train (or null), g_hat, v, theta (or null).
void rho_diagonal(Dtype, const Row* rows, int64_t count, double xi, double q, double* sums, void* stream);
// Rows: val, train (or null), g_hat, g.
void rho_secant(Dtype, const Row* rows, int64_t count, double* sums, void* stream);
// *flag = value.
void set(int64_t* flag, int64_t value, void* stream);
// *finite = 1 if all values are finite, else 0, and then *skipped counts one more.
void all_finite(const double* const* values, int64_t count, double* finite, int64_t* skipped, void* stream);

}  // namespace lets::cuda
