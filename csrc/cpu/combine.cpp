// Two vectors of one chunk. dots: reads both; writes nothing. displacement_dots: reads g, theta, saved; writes nothing.
// combine: reads both; writes out, which may be one of them.
#include "block.h"

namespace lets::cpu::LETS_ISA {
namespace {

// As three calls of Sum::add over u(i) u(i), u(i) v(i) and v(i) v(i); what is widened to double is widened once.
template <class U, class V>
LETS_FN void add(Sum& xx, Sum& xy, Sum& yy, int64_t n, U u, V v) {
  double a[kLanes], b[kLanes], c[kLanes];
  for (int l = 0; l < kLanes; ++l) a[l] = xx.lane[l], b[l] = xy.lane[l], c[l] = yy.lane[l];
  auto term = [&](int64_t i, int l) {
    const double x = u(i + l), y = v(i + l);
    a[l] += x * x, b[l] += x * y, c[l] += y * y;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) term(i, l);
  for (int l = 0; i + l < n; ++l) term(i, l);
  for (int l = 0; l < kLanes; ++l) xx.lane[l] = a[l], xy.lane[l] = b[l], yy.lane[l] = c[l];
}

template <class T>
Three dots_of(const chunk_of::dots& c) {
  auto* const x = static_cast<const T*>(c.x);
  auto* const y = static_cast<const T*>(c.y);
  using C = typename ArithmeticOf<T>::type;
  C x_buffer[kBlockOfTwo], y_buffer[kBlockOfTwo];
  Sum xx, xy, yy;
  for (int64_t at = 0; at < c.numel; at += kBlockOfTwo) {
    const int64_t n = smaller(kBlockOfTwo, c.numel - at);
    const C* u = load<C>(x + at, x_buffer, n, kReadAhead);
    const C* v = load<C>(y + at, y_buffer, n, kReadAhead);
    add(xx, xy, yy, n, [=](int64_t i) { return u[i]; }, [=](int64_t i) { return v[i]; });
  }
  return {Sum::total(xx), Sum::total(xy), Sum::total(yy)};
}

template <class T>
Three displacement_dots_of(const chunk_of::displacement_dots& c) {
  auto* const g = static_cast<const T*>(c.grads);
  auto* const theta = static_cast<const T*>(c.params);
  auto* const saved = static_cast<const T*>(c.saved);
  using C = typename ArithmeticOf<T>::type;
  C g_buffer[kBlockOfThree], now_buffer[kBlockOfThree], before_buffer[kBlockOfThree];
  Sum xx, xy, yy;
  for (int64_t at = 0; at < c.numel; at += kBlockOfThree) {
    const int64_t n = smaller(kBlockOfThree, c.numel - at);
    const C* u = load<C>(g + at, g_buffer, n, kReadAhead);
    const C* now = load<C>(theta + at, now_buffer, n, kReadAhead);
    const C* before = load<C>(saved + at, before_buffer, n, kReadAhead);
    add(xx, xy, yy, n, [=](int64_t i) { return u[i]; }, [=](int64_t i) { return displacement(now[i], before[i]); });
  }
  return {Sum::total(xx), Sum::total(xy), Sum::total(yy)};
}

template <class T>
void combine_of(const chunk_of::combine_& c) {
  auto* const out = static_cast<T*>(c.out);
  auto* const x = static_cast<const T*>(c.x);
  auto* const y = static_cast<const T*>(c.y);
  using C = typename ArithmeticOf<T>::type;
  C x_buffer[kBlock], y_buffer[kBlock];
  const C first = C(c.coefficients[0]), second = C(c.coefficients[1]);
  for (int64_t at = 0; at < c.numel; at += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - at);
    const C* u = load<C>(x + at, x_buffer, n);
    const C* v = load<C>(y + at, y_buffer, n);
    C* to = result<C>(out + at, x_buffer, false);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) to[i] = combined(first, u[i], second, v[i]);
    store<C>(out + at, to, static_cast<T*>(nullptr), n, false);
  }
}

}  // namespace

Three dots(const chunk_of::dots& c) {
  return with_type(c.dtype, [&](auto type) { return dots_of<decltype(type)>(c); });
}

Three displacement_dots(const chunk_of::displacement_dots& c) {
  return with_type(c.dtype, [&](auto type) { return displacement_dots_of<decltype(type)>(c); });
}

void combine_(const chunk_of::combine_& c) {
  return with_type(c.dtype, [&](auto type) { return combine_of<decltype(type)>(c); });
}

}  // namespace lets::cpu::LETS_ISA
