// Perturb and restore one chunk. perturb: reads theta, v (from saved where v is null); writes theta, saved. restore:
// reads saved; writes theta.
#include "block.h"

namespace lets::cpu::LETS_ISA {
namespace {

template <class T>
void perturb_of(T* theta, const T* v, T* saved, int64_t numel, const Scaling& s, double q, double total, double rho,
                bool stream) {
  using C = typename ArithmeticOf<T>::type;
  C theta_buffer[kBlock], v_buffer[kBlock], t_buffer[kBlock];
  const auto [factor, shrink] = perturbation_scale<C>(total, rho, q);
  const C exponent = C(q);
  if (!v) stream = false;  // what stands in `saved` is read first
  for (int64_t b = 0; b < numel; b += kBlock) {
    const int64_t n = smaller(kBlock, numel - b);
    const C* x = v_buffer;
    if (v) {
      x = load<C>(v + b, v_buffer, n);
    } else {
      for (int64_t i = 0; i < n; ++i) v_buffer[i] = widen(saved[b + i]);
    }
    copy(saved + b, theta + b, n * int64_t(sizeof(T)), stream);
    if (factor == 0) continue;
    const C* weights = load<C>(theta + b, theta_buffer, n);
    const C* t = scales<C>(s, weights, x, b, t_buffer, n);
    C* out = result<C>(theta + b, theta_buffer, false);
    if (exponent != 1 && exponent != 2) {
      for (int64_t i = 0; i < n; ++i) {
        const C scale = t ? t[i] : C(1);
        out[i] = weights[i] + factor * (scale * dual(shrink * (scale * x[i]), exponent));
      }
    } else if (!t) {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) out[i] = weights[i] + factor * dual(x[i], exponent);
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) out[i] = weights[i] + factor * (t[i] * dual(t[i] * x[i], exponent));
    }
    store<C>(theta + b, out, static_cast<T*>(nullptr), n, false);
  }
  finish(stream);
}

}  // namespace

void perturb(Dtype dtype, void* theta, const void* v, void* saved, int64_t numel, const Scaling& s, double q,
             double total, double rho, bool stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    perturb_of(static_cast<T*>(theta), static_cast<const T*>(v), static_cast<T*>(saved), numel, s, q, total, rho,
               stream);
  });
}

void restore(void* theta, const void* saved, int64_t bytes, bool stream) {
  copy(theta, saved, bytes, stream);
  finish(stream);
}

}  // namespace lets::cpu::LETS_ISA
