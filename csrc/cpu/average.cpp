// Moving averages of one chunk. average: reads m, x; writes m where its options say so, and out where there is one.
// posterior_ascent: reads s, g; writes out, and s where the gate is open.
#include "block.h"

namespace lets::cpu::LETS_ISA {
namespace {

template <class T>
double average_of(const chunk_of::average_& c) {
  auto* const m = static_cast<T*>(c.averages);
  auto* const x = static_cast<const T*>(c.vectors);
  auto* const out = static_cast<T*>(c.out);
  using C = typename ArithmeticOf<T>::type;
  C m_buffer[kBlock], x_buffer[kBlock], out_buffer[kBlock];
  T narrow_buffer[kBlock];
  const C decay = C(c.decay), rest = C(1 - c.decay), a = C(c.a), b = C(c.b);
  const bool begins = c.updates == 0, go = c.gate != 0;
  Sum sum;
  for (int64_t at = 0; at < c.numel; at += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - at);
    const C* old = load<C>(m + at, m_buffer, n);
    const C* given = load<C>(x + at, x_buffer, n);
    if (go) {
      C* next = result<C>(m + at, m_buffer, false);
      if (begins) {
        for (int64_t i = 0; i < n; ++i) next[i] = given[i];
      } else {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) next[i] = combined(decay, old[i], rest, given[i]);
      }
      old = keep<C>(m + at, next, narrow_buffer, n, false);
    }
    T* target = out ? out + at : nullptr;
    C* to = target ? result<C>(target, out_buffer, c.nontemporal) : out_buffer;
    if (begins) {
      for (int64_t i = 0; i < n; ++i) to[i] = given[i];
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = combined(a, given[i], b, old[i]);
    }
    const C* v = keep<C>(target, to, narrow_buffer, n, c.nontemporal);
    Sum::add(sum, n, [=](int64_t i) { return double(v[i]) * double(v[i]); });
  }
  finish(c.nontemporal);
  return Sum::total(sum);
}

template <class T>
void posterior_ascent_of(const chunk_of::posterior_ascent_& c) {
  auto* const out = static_cast<T*>(c.out);
  auto* const s = static_cast<T*>(c.precisions);
  auto* const g = static_cast<const T*>(c.grads);
  using C = typename ArithmeticOf<T>::type;
  C s_buffer[kBlock], g_buffer[kBlock], out_buffer[kBlock];
  T narrow_buffer[kBlock];
  const C decay = C(c.beta2), rest = C(1 - c.beta2), added = C(c.damping);
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const C* precision = load<C>(s + b, s_buffer, n);
    const C* gradient = load<C>(g + b, g_buffer, n);
    C* to = result<C>(out + b, out_buffer, c.nontemporal);
    for (int64_t i = 0; i < n; ++i) to[i] = gradient[i] / precision[i];
    store<C>(out + b, to, narrow_buffer, n, c.nontemporal);
    if (c.gate == 0) continue;
    C* next = result<C>(s + b, s_buffer, false);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) next[i] = precision_after(precision[i], gradient[i], decay, rest, added);
    store<C>(s + b, next, static_cast<T*>(nullptr), n, false);
  }
  finish(c.nontemporal);
}

}  // namespace

double average_(const chunk_of::average_& c) {
  return with_type(c.dtype, [&](auto type) { return average_of<decltype(type)>(c); });
}

void posterior_ascent_(const chunk_of::posterior_ascent_& c) {
  return with_type(c.dtype, [&](auto type) { return posterior_ascent_of<decltype(type)>(c); });
}

}  // namespace lets::cpu::LETS_ISA
