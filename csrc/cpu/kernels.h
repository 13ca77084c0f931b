// The CPU kernels of one chunk, as a table with one entry an op, one table an instruction set.
// No torch and no standard library here: these files are compiled several times, with different instructions.
#pragma once

#include "../layout.h"
#include "../math.h"
#include "../random.h"

namespace lets::cpu {

struct Dots {
  double xx, xy, yy;
};

struct AverageOptions {
  double decay, a, b;
  bool begins, go;
};

// Elements whose keys are above the threshold, of those whose mask is `member` (-1: of all).
struct Above {
  Draw draw;
  int64_t threshold, member;
};

// Pointers are to the first element of the chunk. `stream`: write around the caches what is not read back. `position`:
// where the chunk's first element stands among the random numbers.
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
  Dots (*dots)(Dtype, const void* x, const void* y, int64_t numel);
  Dots (*displacement_dots)(Dtype, const void* g, const void* theta, const void* saved, int64_t numel);
  void (*combine)(Dtype, void* out, const void* x, const void* y, int64_t numel, double a, double b);
  double (*average)(Dtype, void* m, const void* x, void* out, int64_t numel, const AverageOptions&, bool stream);
  void (*posterior_ascent)(Dtype, void* out, void* s, const void* g, int64_t numel, double beta2, double damping,
                           bool go, bool stream);
  void (*bsam)(Dtype, void* theta, const void* g, void* m, const void* s, const void* saved, int64_t numel, double lr,
               double beta1, double weight_decay, bool stream);
  double (*noise)(Dtype, void* out, const void* v, const void* s, int64_t numel, const Scaling&, const Draw&,
                  int64_t position, double a, double std, bool stream);
  double (*masked)(Dtype, void* out, const void* v, const uint8_t* mask, int64_t numel, const Draw&, int64_t position,
                   double share, bool stream);
  int64_t (*count_above)(Dtype, const void* v, const uint8_t* mask, int64_t numel, int64_t position, const Above&);
  void (*select)(Dtype, uint8_t* mask, const void* v, int64_t numel, int64_t position, const Above&, uint8_t value);
  double (*largest)(Dtype, const void* v, int64_t numel);
  int64_t (*peaks)(Dtype, void* out, const void* v, int64_t numel, double largest, bool stream);
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
  Dots dots(Dtype, const void*, const void*, int64_t);                                                                 \
  Dots displacement_dots(Dtype, const void*, const void*, const void*, int64_t);                                       \
  void combine(Dtype, void*, const void*, const void*, int64_t, double, double);                                       \
  double average(Dtype, void*, const void*, void*, int64_t, const AverageOptions&, bool);                              \
  void posterior_ascent(Dtype, void*, void*, const void*, int64_t, double, double, bool, bool);                        \
  void bsam(Dtype, void*, const void*, void*, const void*, const void*, int64_t, double, double, double, bool);        \
  double noise(Dtype, void*, const void*, const void*, int64_t, const Scaling&, const Draw&, int64_t, double, double,  \
               bool);                                                                                                  \
  double masked(Dtype, void*, const void*, const uint8_t*, int64_t, const Draw&, int64_t, double, bool);               \
  int64_t count_above(Dtype, const void*, const uint8_t*, int64_t, int64_t, const Above&);                             \
  void select(Dtype, uint8_t*, const void*, int64_t, int64_t, const Above&, uint8_t);                                  \
  double largest(Dtype, const void*, int64_t);                                                                         \
  int64_t peaks(Dtype, void*, const void*, int64_t, double, bool);                                                     \
  }

LETS_DECLARE_KERNELS(baseline)
LETS_DECLARE_KERNELS(avx2)
LETS_DECLARE_KERNELS(avx512)

}  // namespace lets::cpu
