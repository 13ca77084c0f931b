// The radius gradient of one chunk. Reads four gradients (theta as well where T needs it); writes nothing.
#include "block.h"

namespace lets::cpu::LETS_ISA {
namespace {

// One pass over the chunk; `train` null stands for zero. `term(outer, g_hat, fourth)` sees double values.
template <class T, class Fourth, class Term>
LETS_FN double outer_sum(const T* val, const T* train, const T* g_hat, int64_t numel, Fourth fourth, Term term) {
  using C = typename ArithmeticOf<T>::type;
  C val_buffer[kBlock], train_buffer[kBlock], hat_buffer[kBlock];
  Sum sum;
  for (int64_t b = 0; b < numel; b += kBlock) {
    const int64_t n = smaller(kBlock, numel - b);
    const C* a = load<C>(val + b, val_buffer, n);
    const C* h = load<C>(g_hat + b, hat_buffer, n);
    const auto* x = fourth(b, n);
    if (train) {
      const C* c = load<C>(train + b, train_buffer, n);
      Sum::add(sum, n, [=](int64_t i) { return term(double(a[i]) - double(c[i]), double(h[i]), double(x[i])); });
    } else {
      Sum::add(sum, n, [=](int64_t i) { return term(double(a[i]), double(h[i]), double(x[i])); });
    }
  }
  return Sum::total(sum);
}

template <class T>
double diagonal_of(const chunk_of::rho_grad_diagonal& c) {
  auto* const val = static_cast<const T*>(c.val);
  auto* const train = static_cast<const T*>(c.train);
  auto* const g_hat = static_cast<const T*>(c.perturbed);
  auto* const v = static_cast<const T*>(c.vectors);
  auto* const theta = static_cast<const T*>(c.params);
  using C = typename ArithmeticOf<T>::type;
  C v_buffer[kBlock], theta_buffer[kBlock], t_buffer[kBlock];
  double power_buffer[kBlock];
  const C exponent = C(c.q);
  // A general power of a small gradient may underflow in float.
  auto powers = [&](int64_t b, int64_t n) -> const double* {
    const C* x = load<C>(v + b, v_buffer, n);
    const C* weights = c.scaling.row_length == kElementWise ? load<C>(theta + b, theta_buffer, n) : nullptr;
    const C* t = scales<C>(c.scaling, weights, x, b, t_buffer, n);
    for (int64_t i = 0; i < n; ++i) {
      const C scale = t ? t[i] : C(1);
      power_buffer[i] = double(scale) * dual(double(scale * x[i]), c.q);
    }
    return power_buffer;
  };
  auto unit = [&](int64_t b, int64_t n) -> const C* {
    const C* x = load<C>(v + b, v_buffer, n);
    const C* weights = c.scaling.row_length == kElementWise ? load<C>(theta + b, theta_buffer, n) : nullptr;
    const C* t = scales<C>(c.scaling, weights, x, b, t_buffer, n);
    if (t) {
      for (int64_t i = 0; i < n; ++i) t_buffer[i] = t[i] * dual(t[i] * x[i], exponent);
      return t_buffer;
    }
    if (c.q == 2) return x;  // else q is 1
    for (int64_t i = 0; i < n; ++i) t_buffer[i] = dual(x[i], exponent);
    return t_buffer;
  };
  auto share = [](double outer, double h, double x) { return diagonal_share(outer, h, x); };
  return c.q == 1 || c.q == 2 ? outer_sum(val, train, g_hat, c.numel, unit, share)
                              : outer_sum(val, train, g_hat, c.numel, powers, share);
}

template <class T>
double secant_of(const chunk_of::rho_grad_secant& c) {
  auto* const val = static_cast<const T*>(c.val);
  auto* const train = static_cast<const T*>(c.train);
  auto* const g_hat = static_cast<const T*>(c.perturbed);
  auto* const g = static_cast<const T*>(c.first);
  using C = typename ArithmeticOf<T>::type;
  C buffer[kBlock];
  auto first = [&](int64_t b, int64_t n) { return load<C>(g + b, buffer, n); };
  return outer_sum(val, train, g_hat, c.numel, first,
                   [](double outer, double h, double x) { return secant_share(outer, h, x); });
}

}  // namespace

double rho_grad_diagonal(const chunk_of::rho_grad_diagonal& c) {
  return with_type(c.dtype, [&](auto type) { return diagonal_of<decltype(type)>(c); });
}

double rho_grad_secant(const chunk_of::rho_grad_secant& c) {
  return with_type(c.dtype, [&](auto type) { return secant_of<decltype(type)>(c); });
}

}  // namespace lets::cpu::LETS_ISA
