// Moving averages of one chunk. average: reads m, x; writes m where its options say so, and out where there is one.
// posterior_ascent: reads s, g; writes out, and s where the gate is open.
#include "block.h"

namespace lets::cpu::LETS_ISA {
namespace {

template <class T>
double walk(const chunk_of::average_& c) {
  using C = Arithmetic<T>;
  Output<T> m(c.averages), out(c.out, c.nontemporal || !c.out);  // without it results stay in its buffer
  Input<T> x(c.vectors);
  const C decay = C(c.decay), rest = C(1 - c.decay), a = C(c.a), b = C(c.b);
  const bool begins = c.updates == 0, go = c.gate != 0;
  Sum sum;
  for (int64_t at = 0; at < c.numel; at += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - at);
    const C *old = load(m, at, n), *given = load(x, at, n);
    if (go) {
      C* next = result(m, at);
      if (begins) {
        for (int64_t i = 0; i < n; ++i) next[i] = given[i];
      } else {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) next[i] = combined(decay, old[i], rest, given[i]);
      }
      old = keep(m, next, at, n);
    }
    C* to = result(out, at);
    if (begins) {
      for (int64_t i = 0; i < n; ++i) to[i] = given[i];
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = combined(a, given[i], b, old[i]);
    }
    Sum::add_squares(sum, n, keep(out, to, at, n));
  }
  finish(c.nontemporal);
  return Sum::total(sum);
}

template <class T>
void walk(const chunk_of::posterior_ascent_& c) {
  using C = Arithmetic<T>;
  Output<T> out(c.out, c.nontemporal), s(c.precisions);
  Input<T> g(c.grads);
  const C decay = C(c.beta2), rest = C(1 - c.beta2), added = C(c.damping);
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const C *precision = load(s, b, n), *gradient = load(g, b, n);
    C* to = result(out, b);
    for (int64_t i = 0; i < n; ++i) to[i] = gradient[i] / precision[i];
    store(out, to, b, n);
    if (c.gate == 0) continue;
    C* next = result(s, b);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) next[i] = precision_after(precision[i], gradient[i], decay, rest, added);
    store(s, next, b, n);
  }
  finish(c.nontemporal);
}

}  // namespace

LETS_OP(average_)
LETS_OP(posterior_ascent_)

}  // namespace lets::cpu::LETS_ISA
