// The CPU kernels of one chunk, as a table with one entry an op, one table an instruction set.
// No torch and no standard library here: these files are compiled several times, with different instructions.
#pragma once

#include "../layout.h"
#include "../math.h"

namespace lets::cpu {

// Pointers are to the first element of the chunk. `stream`: write around the caches what is not read back.
struct Kernels {
  double (*norm)(Dtype, const void* v, const void* theta, int64_t numel, const Scaling&, double q);
  double (*filter_norm)(Dtype, const void* theta, int64_t numel, int64_t row_length, int64_t row_count, int64_t row);
  void (*perturb)(Dtype, void* theta, const void* v, void* saved, int64_t numel, const Scaling&, double q, double total,
                  double rho, bool stream);
  void (*restore)(void* theta, const void* saved, int64_t bytes, bool stream);
  void (*sgd)(Dtype, void* theta, const void* g, void* m, const void* saved, int64_t numel, const SgdOptions&,
              bool stream);
  void (*adam)(Dtype, void* theta, const void* g, void* m, void* v, const void* saved, int64_t numel, double step,
               const AdamOptions&, bool stream);
  double (*rho_diagonal)(Dtype, const void* val, const void* train, const void* g_hat, const void* v, const void* theta,
                         int64_t numel, const Scaling&, double q);
  double (*rho_secant)(Dtype, const void* val, const void* train, const void* g_hat, const void* g, int64_t numel);
};

#define LETS_DECLARE_KERNELS(isa)                                                                                      \
  namespace isa {                                                                                                      \
  double norm(Dtype, const void*, const void*, int64_t, const Scaling&, double);                                       \
  double filter_norm(Dtype, const void*, int64_t, int64_t, int64_t, int64_t);                                          \
  void perturb(Dtype, void*, const void*, void*, int64_t, const Scaling&, double, double, double, bool);               \
  void restore(void*, const void*, int64_t, bool);                                                                     \
  void sgd(Dtype, void*, const void*, void*, const void*, int64_t, const SgdOptions&, bool);                           \
  void adam(Dtype, void*, const void*, void*, void*, const void*, int64_t, double, const AdamOptions&, bool);          \
  double rho_diagonal(Dtype, const void*, const void*, const void*, const void*, const void*, int64_t, const Scaling&, \
                      double);                                                                                         \
  double rho_secant(Dtype, const void*, const void*, const void*, const void*, int64_t);                               \
  }

LETS_DECLARE_KERNELS(baseline)
LETS_DECLARE_KERNELS(avx2)
LETS_DECLARE_KERNELS(avx512)

}  // namespace lets::cpu
