// Gradient norm and filter norms of one chunk, and its largest elements. norm: reads v (and theta where T needs it).
// largest: reads v. peaks: reads v; writes out.
#include "block.h"

namespace lets::cpu::LETS_ISA {
namespace {

template <class C>
struct BitsOf {
  using type = int32_t;
};
template <>
struct BitsOf<double> {
  using type = int64_t;
};

template <class T>
double norm_of(const chunk_of::grad_norm& c) {
  auto* const v = static_cast<const T*>(c.vectors);
  auto* const theta = static_cast<const T*>(c.params);
  using C = typename ArithmeticOf<T>::type;
  C v_buffer[kBlock], theta_buffer[kBlock], t_buffer[kBlock];
  Sum sum;
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const C* x = load<C>(v + b, v_buffer, n);
    const C* weights = c.scaling.row_length == kElementWise ? load<C>(theta + b, theta_buffer, n) : nullptr;
    if (const C* t = scales<C>(c.scaling, weights, x, b, t_buffer, n)) {
      for (int64_t i = 0; i < n; ++i) v_buffer[i] = t[i] * x[i];
      x = v_buffer;
    }
    if (c.q == 2) {
      Sum::add(sum, n, [=](int64_t i) { return double(x[i]) * double(x[i]); });
    } else if (c.q == 1) {
      Sum::add(sum, n, [=](int64_t i) { return absolute(double(x[i])); });
    } else {
      Sum::add(sum, n, [=, q = c.q](int64_t i) { return power(absolute(double(x[i])), q); });
    }
  }
  return Sum::total(sum);
}

template <class T>
void filter_norm_of(const chunk_of::filter_norms& c) {
  auto* const theta = static_cast<const T*>(c.params);
  using C = typename ArithmeticOf<T>::type;
  C buffer[kBlock];
  const int64_t row = c.scaling.offset, row_length = c.scaling.row_length, row_count = c.scaling.row_count;
  Sum sum;
  for (int64_t outer = row * row_length; outer < c.numel; outer += row_length * row_count) {
    for (int64_t b = 0; b < row_length; b += kBlock) {
      const int64_t n = smaller(kBlock, row_length - b);
      const C* x = load<C>(theta + outer + b, buffer, n);
      Sum::add(sum, n, [=](int64_t i) { return double(x[i]) * double(x[i]); });
    }
  }
  static_cast<C*>(const_cast<void*>(c.scaling.norms))[row] = C(square_root(Sum::total(sum)));
}

// Bits without the sign are ordered as the values are, and those of a NaN stand above all others.
template <class T>
double largest_of(const chunk_of::largest& c) {
  auto* const v = static_cast<const T*>(c.vectors);
  using C = typename ArithmeticOf<T>::type;
  using Bits = typename BitsOf<C>::type;
  C buffer[kBlock];
  Bits highest = 0;
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const C* x = load<C>(v + b, buffer, n);
    Bits found = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Bits bits = bit_cast<Bits>(absolute(x[i]));
      found = bits > found ? bits : found;
    }
    highest = found > highest ? found : highest;
  }
  return double(bit_cast<C>(highest));
}

template <class T>
double peaks_of(const chunk_of::peaks_& c) {
  auto* const out = static_cast<T*>(c.out);
  auto* const v = static_cast<const T*>(c.vectors);
  using C = typename ArithmeticOf<T>::type;
  const double largest = c.largest;
  C v_buffer[kBlock], out_buffer[kBlock];
  T narrow_buffer[kBlock];
  int64_t count = 0;
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const C* x = load<C>(v + b, v_buffer, n);
    C* to = result<C>(out + b, out_buffer, c.nontemporal);
    int64_t found = 0;
    for (int64_t i = 0; i < n; ++i) {
      const C value = x[i];
      const bool peak = double(absolute(value)) == largest;
      to[i] = peak ? dual(value, C(1)) : C(0);
      found += peak;
    }
    count += found;
    store<C>(out + b, to, narrow_buffer, n, c.nontemporal);
  }
  finish(c.nontemporal);
  return double(count);
}

}  // namespace

double grad_norm(const chunk_of::grad_norm& c) {
  return with_type(c.dtype, [&](auto type) { return norm_of<decltype(type)>(c); });
}

void filter_norms(const chunk_of::filter_norms& c) {
  return with_type(c.dtype, [&](auto type) { return filter_norm_of<decltype(type)>(c); });
}

double largest(const chunk_of::largest& c) {
  return with_type(c.dtype, [&](auto type) { return largest_of<decltype(type)>(c); });
}

double peaks_(const chunk_of::peaks_& c) {
  return with_type(c.dtype, [&](auto type) { return peaks_of<decltype(type)>(c); });
}

}  // namespace lets::cpu::LETS_ISA
