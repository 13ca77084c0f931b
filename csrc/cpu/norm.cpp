// Gradient norm and filter norms of one chunk, and its largest elements. norm: reads v (and theta where T needs it).
// largest: reads v. peaks: reads v; writes out.
#include "block.h"

namespace lets::cpu::LETS_ISA {
namespace {

// Bits without the sign are ordered as the values are, and those of a NaN stand above all others.
LETS_FN int32_t magnitude(float x) { return bit_cast<int32_t>(absolute(x)); }
LETS_FN int64_t magnitude(double x) { return bit_cast<int64_t>(absolute(x)); }

template <class T>
double walk(const chunk_of::grad_norm& c) {
  using C = Arithmetic<T>;
  Input<T> v(c.vectors), theta(c.params);
  C t_buffer[kBlock];
  Sum sum;
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const C* x = load(v, b, n);
    if (const C* t = scales(c.scaling, theta, x, b, t_buffer, n)) {
      for (int64_t i = 0; i < n; ++i) v.buffer[i] = t[i] * x[i];
      x = v.buffer;
    }
    if (c.q == 2) {
      Sum::add_squares(sum, n, x);
    } else if (c.q == 1) {
      Sum::add(sum, n, [=](int64_t i) { return absolute(double(x[i])); });
    } else {
      Sum::add(sum, n, [=, q = c.q](int64_t i) { return power(absolute(double(x[i])), q); });
    }
  }
  return Sum::total(sum);
}

template <class T>
void walk(const chunk_of::filter_norms& c) {
  using C = Arithmetic<T>;
  Input<T> theta(c.params);
  const int64_t filter = c.scaling.offset, length = c.scaling.filter_length, count = c.scaling.filter_count;
  Sum sum;
  for (int64_t outer = filter * length; outer < c.numel; outer += length * count) {
    for (int64_t b = 0; b < length; b += kBlock) {
      const int64_t n = smaller(kBlock, length - b);
      Sum::add_squares(sum, n, load(theta, outer + b, n));
    }
  }
  static_cast<C*>(const_cast<void*>(c.scaling.norms))[filter] = C(square_root(Sum::total(sum)));
}

template <class T>
double walk(const chunk_of::largest& c) {
  using C = Arithmetic<T>;
  Input<T> v(c.vectors);
  auto highest = magnitude(C(0));
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const C* x = load(v, b, n);
    auto found = magnitude(C(0));
    for (int64_t i = 0; i < n; ++i) found = magnitude(x[i]) > found ? magnitude(x[i]) : found;
    highest = found > highest ? found : highest;
  }
  return double(bit_cast<C>(highest));
}

template <class T>
double walk(const chunk_of::peaks_& c) {
  using C = Arithmetic<T>;
  Output<T> out(c.out, c.nontemporal);
  Input<T> v(c.vectors);
  const double largest = c.largest;
  int64_t count = 0;
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const C* x = load(v, b, n);
    C* to = result(out, b);
    int64_t found = 0;
    for (int64_t i = 0; i < n; ++i) {
      const C value = x[i];
      const bool peak = double(absolute(value)) == largest;
      to[i] = peak ? dual(value, C(1)) : C(0);
      found += peak;
    }
    count += found;
    store(out, to, b, n);
  }
  finish(c.nontemporal);
  return double(count);
}

}  // namespace

LETS_OP(grad_norm)
LETS_OP(filter_norms)
LETS_OP(largest)
LETS_OP(peaks_)

}  // namespace lets::cpu::LETS_ISA
