// The base optimizer's step from the saved weights, one chunk.
// SGD: reads saved, g (and m); writes theta (and m). Adam: reads saved, g, m, v; writes theta, m, v. Lion: reads saved,
// g, m; writes theta, m. bSAM: reads saved, g, m, s; writes theta, m.
#include "block.h"

namespace lets::cpu::LETS_ISA {
namespace {

template <class T>
void sgd_chunk(const chunk_of::restore_sgd_& c) {
  auto* const theta = static_cast<T*>(c.params);
  auto* const g = static_cast<const T*>(c.grads);
  auto* const m = static_cast<T*>(c.momenta);
  auto* const saved = static_cast<const T*>(c.saved);
  using C = typename ArithmeticOf<T>::type;
  C saved_buffer[kBlock], g_buffer[kBlock], m_buffer[kBlock], out_buffer[kBlock];
  T narrow_buffer[kBlock];
  const Sgd<C> sgd = sgd_of<C>(c);
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const C* weights = load<C>(saved + b, saved_buffer, n);
    const C* gradient = load<C>(g + b, g_buffer, n);
    C* out = result<C>(theta + b, out_buffer, c.nontemporal);
    if (m) {
      const C* old = load<C>(m + b, m_buffer, n);
      C* average = result<C>(m + b, m_buffer, false);
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        C next = old[i];
        out[i] = Sgd<C>::step(sgd, weights[i], gradient[i], &next);
        average[i] = next;
      }
      store<C>(m + b, average, static_cast<T*>(nullptr), n, false);
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) out[i] = Sgd<C>::step(sgd, weights[i], gradient[i], static_cast<C*>(nullptr));
    }
    store<C>(theta + b, out, narrow_buffer, n, c.nontemporal);
  }
  finish(c.nontemporal);
}

template <class T>
void adam_chunk(const chunk_of::restore_adamw_& c) {
  auto* const theta = static_cast<T*>(c.params);
  auto* const g = static_cast<const T*>(c.grads);
  auto* const m = static_cast<T*>(c.exp_avgs);
  auto* const v = static_cast<T*>(c.exp_avg_sqs);
  auto* const saved = static_cast<const T*>(c.saved);
  using C = typename ArithmeticOf<T>::type;
  C saved_buffer[kBlock], g_buffer[kBlock], m_buffer[kBlock], v_buffer[kBlock], out_buffer[kBlock];
  T narrow_buffer[kBlock];
  const Adam<C> adam = adam_of<C>(c, double(*c.steps));
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const C* weights = load<C>(saved + b, saved_buffer, n);
    const C* gradient = load<C>(g + b, g_buffer, n);
    const C* old_m = load<C>(m + b, m_buffer, n);
    const C* old_v = load<C>(v + b, v_buffer, n);
    C* next_m = result<C>(m + b, m_buffer, false);
    C* next_v = result<C>(v + b, v_buffer, false);
    C* out = result<C>(theta + b, out_buffer, c.nontemporal);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      C first = old_m[i], second = old_v[i];
      out[i] = Adam<C>::step(adam, weights[i], gradient[i], first, second);
      next_m[i] = first;
      next_v[i] = second;
    }
    store<C>(m + b, next_m, static_cast<T*>(nullptr), n, false);
    store<C>(v + b, next_v, static_cast<T*>(nullptr), n, false);
    store<C>(theta + b, out, narrow_buffer, n, c.nontemporal);
  }
  finish(c.nontemporal);
}

template <class T>
void lion_chunk(const chunk_of::restore_lion_& c) {
  auto* const theta = static_cast<T*>(c.params);
  auto* const g = static_cast<const T*>(c.grads);
  auto* const m = static_cast<T*>(c.exp_avgs);
  auto* const saved = static_cast<const T*>(c.saved);
  using C = typename ArithmeticOf<T>::type;
  C saved_buffer[kBlock], g_buffer[kBlock], m_buffer[kBlock], out_buffer[kBlock];
  T narrow_buffer[kBlock];
  const Lion<C> lion = lion_of<C>(c);
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const C* weights = load<C>(saved + b, saved_buffer, n);
    const C* gradient = load<C>(g + b, g_buffer, n);
    const C* old = load<C>(m + b, m_buffer, n);
    C* average = result<C>(m + b, m_buffer, false);
    C* out = result<C>(theta + b, out_buffer, c.nontemporal);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      C next = old[i];
      out[i] = Lion<C>::step(lion, weights[i], gradient[i], next);
      average[i] = next;
    }
    store<C>(m + b, average, static_cast<T*>(nullptr), n, false);
    store<C>(theta + b, out, narrow_buffer, n, c.nontemporal);
  }
  finish(c.nontemporal);
}

template <class T>
void bsam_chunk(const chunk_of::restore_bsam_& c) {
  auto* const theta = static_cast<T*>(c.params);
  auto* const g = static_cast<const T*>(c.grads);
  auto* const m = static_cast<T*>(c.exp_avgs);
  auto* const s = static_cast<const T*>(c.precisions);
  auto* const saved = static_cast<const T*>(c.saved);
  using C = typename ArithmeticOf<T>::type;
  C saved_buffer[kBlock], g_buffer[kBlock], m_buffer[kBlock], s_buffer[kBlock], out_buffer[kBlock];
  T narrow_buffer[kBlock];
  const Bsam<C> bsam = bsam_of<C>(c);
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const C* weights = load<C>(saved + b, saved_buffer, n);
    const C* gradient = load<C>(g + b, g_buffer, n);
    const C* old = load<C>(m + b, m_buffer, n);
    const C* precision = load<C>(s + b, s_buffer, n);
    C* average = result<C>(m + b, m_buffer, false);
    C* out = result<C>(theta + b, out_buffer, c.nontemporal);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      C next = old[i];
      out[i] = Bsam<C>::step(bsam, weights[i], gradient[i], next, precision[i]);
      average[i] = next;
    }
    store<C>(m + b, average, static_cast<T*>(nullptr), n, false);
    store<C>(theta + b, out, narrow_buffer, n, c.nontemporal);
  }
  finish(c.nontemporal);
}

}  // namespace

void restore_sgd_(const chunk_of::restore_sgd_& c) {
  return with_type(c.dtype, [&](auto type) { return sgd_chunk<decltype(type)>(c); });
}

void restore_adamw_(const chunk_of::restore_adamw_& c) {
  return with_type(c.dtype, [&](auto type) { return adam_chunk<decltype(type)>(c); });
}

void restore_lion_(const chunk_of::restore_lion_& c) {
  return with_type(c.dtype, [&](auto type) { return lion_chunk<decltype(type)>(c); });
}

void restore_bsam_(const chunk_of::restore_bsam_& c) {
  return with_type(c.dtype, [&](auto type) { return bsam_chunk<decltype(type)>(c); });
}

}  // namespace lets::cpu::LETS_ISA
