// Two vectors of one chunk. dots: reads both; writes nothing. displacement_dots: reads g, theta, saved; writes nothing.
// combine: reads both; writes out, which may be one of them.
#include "block.h"

namespace lets::cpu::LETS_ISA {
namespace {

// One pass over the chunk; `second(begin, n)` is a block of y.
template <class T, class Second>
LETS_FN Dots dots_with(const T* x, int64_t numel, Second second) {
  using C = typename ArithmeticOf<T>::type;
  C x_buffer[kBlock];
  Sum xx, xy, yy;
  for (int64_t b = 0; b < numel; b += kBlock) {
    const int64_t n = smaller(kBlock, numel - b);
    const C* u = load<C>(x + b, x_buffer, n);
    const C* v = second(b, n);
    Sum::add(xx, n, [=](int64_t i) { return double(u[i]) * double(u[i]); });
    Sum::add(xy, n, [=](int64_t i) { return double(u[i]) * double(v[i]); });
    Sum::add(yy, n, [=](int64_t i) { return double(v[i]) * double(v[i]); });
  }
  return {Sum::total(xx), Sum::total(xy), Sum::total(yy)};
}

template <class T>
Dots dots_of(const T* x, const T* y, int64_t numel) {
  using C = typename ArithmeticOf<T>::type;
  C buffer[kBlock];
  return dots_with(x, numel, [&](int64_t b, int64_t n) { return load<C>(y + b, buffer, n); });
}

template <class T>
Dots displacement_dots_of(const T* g, const T* theta, const T* saved, int64_t numel) {
  using C = typename ArithmeticOf<T>::type;
  C now_buffer[kBlock], before_buffer[kBlock];
  return dots_with(g, numel, [&](int64_t b, int64_t n) -> const C* {
    const C* now = load<C>(theta + b, now_buffer, n);
    const C* before = load<C>(saved + b, before_buffer, n);
    for (int64_t i = 0; i < n; ++i) before_buffer[i] = displacement(now[i], before[i]);
    return before_buffer;
  });
}

template <class T>
void combine_of(T* out, const T* x, const T* y, int64_t numel, double a, double b) {
  using C = typename ArithmeticOf<T>::type;
  C x_buffer[kBlock], y_buffer[kBlock];
  const C first = C(a), second = C(b);
  for (int64_t at = 0; at < numel; at += kBlock) {
    const int64_t n = smaller(kBlock, numel - at);
    const C* u = load<C>(x + at, x_buffer, n);
    const C* v = load<C>(y + at, y_buffer, n);
    C* to = result<C>(out + at, x_buffer, false);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) to[i] = combined(first, u[i], second, v[i]);
    store<C>(out + at, to, static_cast<T*>(nullptr), n, false);
  }
}

}  // namespace

Dots dots(Dtype dtype, const void* x, const void* y, int64_t numel) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return dots_of(static_cast<const T*>(x), static_cast<const T*>(y), numel);
  });
}

Dots displacement_dots(Dtype dtype, const void* g, const void* theta, const void* saved, int64_t numel) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return displacement_dots_of(static_cast<const T*>(g), static_cast<const T*>(theta), static_cast<const T*>(saved),
                                numel);
  });
}

void combine(Dtype dtype, void* out, const void* x, const void* y, int64_t numel, double a, double b) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    combine_of(static_cast<T*>(out), static_cast<const T*>(x), static_cast<const T*>(y), numel, a, b);
  });
}

}  // namespace lets::cpu::LETS_ISA
