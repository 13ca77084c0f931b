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
Three walk(const chunk_of::dots& c) {
  using C = Arithmetic<T>;
  Input<T, kBlockOfTwo> x(c.x), y(c.y);
  Sum xx, xy, yy;
  for (int64_t at = 0; at < c.numel; at += kBlockOfTwo) {
    const int64_t n = smaller(kBlockOfTwo, c.numel - at);
    const C *u = load(x, at, n, kReadAhead), *v = load(y, at, n, kReadAhead);
    add(xx, xy, yy, n, [=](int64_t i) { return u[i]; }, [=](int64_t i) { return v[i]; });
  }
  return {Sum::total(xx), Sum::total(xy), Sum::total(yy)};
}

template <class T>
Three walk(const chunk_of::displacement_dots& c) {
  using C = Arithmetic<T>;
  Input<T, kBlockOfThree> g(c.grads), theta(c.params), saved(c.saved);
  Sum xx, xy, yy;
  for (int64_t at = 0; at < c.numel; at += kBlockOfThree) {
    const int64_t n = smaller(kBlockOfThree, c.numel - at);
    const C* u = load(g, at, n, kReadAhead);
    const C *now = load(theta, at, n, kReadAhead), *before = load(saved, at, n, kReadAhead);
    add(xx, xy, yy, n, [=](int64_t i) { return u[i]; }, [=](int64_t i) { return displacement(now[i], before[i]); });
  }
  return {Sum::total(xx), Sum::total(xy), Sum::total(yy)};
}

template <class T>
void walk(const chunk_of::combine_& c) {
  using C = Arithmetic<T>;
  Output<T> out(c.out);
  Input<T> x(c.x), y(c.y);
  const C first = C(c.coefficients[0]), second = C(c.coefficients[1]);
  for (int64_t at = 0; at < c.numel; at += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - at);
    const C *u = load(x, at, n), *v = load(y, at, n);
    C* to = result(out, at);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) to[i] = combined(first, u[i], second, v[i]);
    store(out, to, at, n);
  }
}

}  // namespace

LETS_OP(dots)
LETS_OP(displacement_dots)
LETS_OP(combine_)

}  // namespace lets::cpu::LETS_ISA
