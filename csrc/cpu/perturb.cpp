// Perturb and restore one chunk. perturb: reads theta, v (from saved where v is null); writes theta, saved. restore:
// reads saved; writes theta.
#include "block.h"

namespace lets::cpu::LETS_ISA {
namespace {

template <class T>
void walk(const chunk_of::perturb_& c) {
  using C = Arithmetic<T>;
  Output<T> theta(c.params);
  auto* const saved = static_cast<T*>(c.saved);
  Input<T> v(c.vectors);
  C t_buffer[kBlock];
  const auto [factor, shrink] = perturbation_scale<C>(c.total, c.rho, c.q);
  const C exponent = C(c.q);
  const bool nontemporal = v.list && c.nontemporal;  // what stands in `saved` is read first
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const C* x = v.buffer;
    if (v.list) {
      x = load(v, b, n);
    } else {
      for (int64_t i = 0; i < n; ++i) v.buffer[i] = widen(saved[b + i]);
    }
    copy(saved + b, theta.list + b, n * int64_t(sizeof(T)), nontemporal);
    if (factor == 0) continue;
    const C* weights = load(theta, b, n);
    const C* t = scales(c.scaling, weights, x, b, t_buffer, n);
    C* out = result(theta, b);
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
    store(theta, out, b, n);
  }
  finish(nontemporal);
}

}  // namespace

LETS_OP(perturb_)

void restore_(const chunk_of::restore_& c) {
  copy(c.params, c.saved, c.numel * size_of(c.dtype), c.nontemporal);
  finish(c.nontemporal);
}

}  // namespace lets::cpu::LETS_ISA
