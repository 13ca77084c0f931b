// Moving averages of one chunk. average: reads m, x; writes m where its options say so, and out where there is one.
// posterior_ascent: reads s, g; writes out, and s where the gate is open.
#include "block.h"

namespace lets::cpu::LETS_ISA {
namespace {

template <class T>
double average_of(T* m, const T* x, T* out, int64_t numel, const AverageOptions& options, bool stream) {
  using C = typename ArithmeticOf<T>::type;
  C m_buffer[kBlock], x_buffer[kBlock], out_buffer[kBlock];
  T narrow_buffer[kBlock];
  const C decay = C(options.decay), rest = C(1 - options.decay), a = C(options.a), b = C(options.b);
  Sum sum;
  for (int64_t at = 0; at < numel; at += kBlock) {
    const int64_t n = smaller(kBlock, numel - at);
    const C* old = load<C>(m + at, m_buffer, n);
    const C* given = load<C>(x + at, x_buffer, n);
    if (options.go) {
      C* next = result<C>(m + at, m_buffer, false);
      if (options.begins) {
        for (int64_t i = 0; i < n; ++i) next[i] = given[i];
      } else {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) next[i] = combined(decay, old[i], rest, given[i]);
      }
      old = keep<C>(m + at, next, narrow_buffer, n, false);
    }
    T* target = out ? out + at : nullptr;
    C* to = target ? result<C>(target, out_buffer, stream) : out_buffer;
    if (options.begins) {
      for (int64_t i = 0; i < n; ++i) to[i] = given[i];
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = combined(a, given[i], b, old[i]);
    }
    const C* v = keep<C>(target, to, narrow_buffer, n, stream);
    Sum::add(sum, n, [=](int64_t i) { return double(v[i]) * double(v[i]); });
  }
  finish(stream);
  return Sum::total(sum);
}

template <class T>
void posterior_ascent_of(T* out, T* s, const T* g, int64_t numel, double beta2, double damping, bool go, bool stream) {
  using C = typename ArithmeticOf<T>::type;
  C s_buffer[kBlock], g_buffer[kBlock], out_buffer[kBlock];
  T narrow_buffer[kBlock];
  const C decay = C(beta2), rest = C(1 - beta2), added = C(damping);
  for (int64_t b = 0; b < numel; b += kBlock) {
    const int64_t n = smaller(kBlock, numel - b);
    const C* precision = load<C>(s + b, s_buffer, n);
    const C* gradient = load<C>(g + b, g_buffer, n);
    C* to = result<C>(out + b, out_buffer, stream);
    for (int64_t i = 0; i < n; ++i) to[i] = gradient[i] / precision[i];
    store<C>(out + b, to, narrow_buffer, n, stream);
    if (!go) continue;
    C* next = result<C>(s + b, s_buffer, false);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) next[i] = precision_after(precision[i], gradient[i], decay, rest, added);
    store<C>(s + b, next, static_cast<T*>(nullptr), n, false);
  }
  finish(stream);
}

}  // namespace

double average(Dtype dtype, void* m, const void* x, void* out, int64_t numel, const AverageOptions& options,
               bool stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return average_of(static_cast<T*>(m), static_cast<const T*>(x), static_cast<T*>(out), numel, options, stream);
  });
}

void posterior_ascent(Dtype dtype, void* out, void* s, const void* g, int64_t numel, double beta2, double damping,
                      bool go, bool stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    posterior_ascent_of(static_cast<T*>(out), static_cast<T*>(s), static_cast<const T*>(g), numel, beta2, damping, go,
                        stream);
  });
}

}  // namespace lets::cpu::LETS_ISA
