// The radius gradient of one chunk. Reads four gradients (theta as well where T needs it); writes nothing.
#include "block.h"

namespace lets::cpu::LETS_ISA {
namespace {

// One pass over the chunk; `train` null stands for zero. `term(outer, g_hat, fourth)` sees double values.
template <class T, class Chunk, class Fourth, class Term>
LETS_FN double outer_sum(const Chunk& chunk, Fourth fourth, Term term) {
  using C = Arithmetic<T>;
  Input<T> val(chunk.val), train(chunk.train), g_hat(chunk.perturbed);
  Sum sum;
  for (int64_t b = 0; b < chunk.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, chunk.numel - b);
    const C *a = load(val, b, n), *h = load(g_hat, b, n);
    const auto* x = fourth(b, n);
    if (chunk.train) {
      const C* c = load(train, b, n);
      Sum::add(sum, n, [=](int64_t i) { return term(double(a[i]) - double(c[i]), double(h[i]), double(x[i])); });
    } else {
      Sum::add(sum, n, [=](int64_t i) { return term(double(a[i]), double(h[i]), double(x[i])); });
    }
  }
  return Sum::total(sum);
}

template <class T>
double walk(const chunk_of::rho_grad_diagonal& c) {
  using C = Arithmetic<T>;
  Input<T> v(c.vectors), theta(c.params);
  C t_buffer[kBlock];
  double power_buffer[kBlock];
  const C exponent = C(c.q);
  // A general power of a small gradient may underflow in float.
  auto powers = [&](int64_t b, int64_t n) -> const double* {
    const C* x = load(v, b, n);
    const C* t = scales(c.scaling, theta, x, b, t_buffer, n);
    for (int64_t i = 0; i < n; ++i) {
      const C scale = t ? t[i] : C(1);
      power_buffer[i] = double(scale) * dual(double(scale * x[i]), c.q);
    }
    return power_buffer;
  };
  auto unit = [&](int64_t b, int64_t n) -> const C* {
    const C* x = load(v, b, n);
    if (const C* t = scales(c.scaling, theta, x, b, t_buffer, n)) {
      for (int64_t i = 0; i < n; ++i) t_buffer[i] = t[i] * dual(t[i] * x[i], exponent);
      return t_buffer;
    }
    if (c.q == 2) return x;  // else q is 1
    for (int64_t i = 0; i < n; ++i) t_buffer[i] = dual(x[i], exponent);
    return t_buffer;
  };
  auto share = [](double outer, double h, double x) { return diagonal_share(outer, h, x); };
  return c.q == 1 || c.q == 2 ? outer_sum<T>(c, unit, share) : outer_sum<T>(c, powers, share);
}

template <class T>
double walk(const chunk_of::rho_grad_secant& c) {
  Input<T> g(c.first);
  auto first = [&](int64_t b, int64_t n) { return load(g, b, n); };
  return outer_sum<T>(c, first, [](double outer, double h, double x) { return secant_share(outer, h, x); });
}

}  // namespace

LETS_OP(rho_grad_diagonal)
LETS_OP(rho_grad_secant)

}  // namespace lets::cpu::LETS_ISA
