// Perturb and restore one chunk. perturb: reads theta, v (from saved where v is null); writes theta, saved. restore:
// reads saved; writes theta.
#include "block.h"

namespace lets::cpu::LETS_ISA {
namespace {

template <class T>
void perturb_of(const chunk_of::perturb_& c) {
  auto* const theta = static_cast<T*>(c.params);
  auto* const v = static_cast<const T*>(c.vectors);
  auto* const saved = static_cast<T*>(c.saved);
  using C = typename ArithmeticOf<T>::type;
  C theta_buffer[kBlock], v_buffer[kBlock], t_buffer[kBlock];
  const auto [factor, shrink] = perturbation_scale<C>(c.total, c.rho, c.q);
  const C exponent = C(c.q);
  const bool nontemporal = v && c.nontemporal;  // what stands in `saved` is read first
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const C* x = v_buffer;
    if (v) {
      x = load<C>(v + b, v_buffer, n);
    } else {
      for (int64_t i = 0; i < n; ++i) v_buffer[i] = widen(saved[b + i]);
    }
    copy(saved + b, theta + b, n * int64_t(sizeof(T)), nontemporal);
    if (factor == 0) continue;
    const C* weights = load<C>(theta + b, theta_buffer, n);
    const C* t = scales<C>(c.scaling, weights, x, b, t_buffer, n);
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
  finish(nontemporal);
}

}  // namespace

void perturb_(const chunk_of::perturb_& c) {
  return with_type(c.dtype, [&](auto type) { return perturb_of<decltype(type)>(c); });
}

void restore_(const chunk_of::restore_& c) {
  copy(c.params, c.saved, c.numel * size_of(c.dtype), c.nontemporal);
  finish(c.nontemporal);
}

}  // namespace lets::cpu::LETS_ISA
