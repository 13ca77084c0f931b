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
double norm_of(const T* v, const T* theta, int64_t numel, const Scaling& s, double q) {
  using C = typename ArithmeticOf<T>::type;
  C v_buffer[kBlock], theta_buffer[kBlock], t_buffer[kBlock];
  Sum sum;
  for (int64_t b = 0; b < numel; b += kBlock) {
    const int64_t n = smaller(kBlock, numel - b);
    const C* x = load<C>(v + b, v_buffer, n);
    const C* weights = s.row_length == 0 ? load<C>(theta + b, theta_buffer, n) : nullptr;
    if (const C* t = scales<C>(s, weights, x, b, t_buffer, n)) {
      for (int64_t i = 0; i < n; ++i) v_buffer[i] = t[i] * x[i];
      x = v_buffer;
    }
    if (q == 2) {
      Sum::add(sum, n, [=](int64_t i) { return double(x[i]) * double(x[i]); });
    } else if (q == 1) {
      Sum::add(sum, n, [=](int64_t i) { return absolute(double(x[i])); });
    } else {
      Sum::add(sum, n, [=](int64_t i) { return power(absolute(double(x[i])), q); });
    }
  }
  return Sum::total(sum);
}

template <class T>
double filter_norm_of(const T* theta, int64_t numel, int64_t row_length, int64_t row_count, int64_t row) {
  using C = typename ArithmeticOf<T>::type;
  C buffer[kBlock];
  Sum sum;
  for (int64_t outer = row * row_length; outer < numel; outer += row_length * row_count) {
    for (int64_t b = 0; b < row_length; b += kBlock) {
      const int64_t n = smaller(kBlock, row_length - b);
      const C* x = load<C>(theta + outer + b, buffer, n);
      Sum::add(sum, n, [=](int64_t i) { return double(x[i]) * double(x[i]); });
    }
  }
  return square_root(Sum::total(sum));
}

// Bits without the sign are ordered as the values are, and those of a NaN stand above all others.
template <class T>
double largest_of(const T* v, int64_t numel) {
  using C = typename ArithmeticOf<T>::type;
  using Bits = typename BitsOf<C>::type;
  C buffer[kBlock];
  Bits highest = 0;
  for (int64_t b = 0; b < numel; b += kBlock) {
    const int64_t n = smaller(kBlock, numel - b);
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
int64_t peaks_of(T* out, const T* v, int64_t numel, double largest, bool stream) {
  using C = typename ArithmeticOf<T>::type;
  C v_buffer[kBlock], out_buffer[kBlock];
  T narrow_buffer[kBlock];
  int64_t count = 0;
  for (int64_t b = 0; b < numel; b += kBlock) {
    const int64_t n = smaller(kBlock, numel - b);
    const C* x = load<C>(v + b, v_buffer, n);
    C* to = result<C>(out + b, out_buffer, stream);
    int64_t found = 0;
    for (int64_t i = 0; i < n; ++i) {
      const C value = x[i];
      const bool peak = double(absolute(value)) == largest;
      to[i] = peak ? dual(value, C(1)) : C(0);
      found += peak;
    }
    count += found;
    store<C>(out + b, to, narrow_buffer, n, stream);
  }
  finish(stream);
  return count;
}

}  // namespace

double norm(Dtype dtype, const void* v, const void* theta, int64_t numel, const Scaling& s, double q) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return norm_of(static_cast<const T*>(v), static_cast<const T*>(theta), numel, s, q);
  });
}

double filter_norm(Dtype dtype, const void* theta, int64_t numel, int64_t row_length, int64_t row_count, int64_t row) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return filter_norm_of(static_cast<const T*>(theta), numel, row_length, row_count, row);
  });
}

double largest(Dtype dtype, const void* v, int64_t numel) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return largest_of(static_cast<const T*>(v), numel);
  });
}

int64_t peaks(Dtype dtype, void* out, const void* v, int64_t numel, double largest, bool stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return peaks_of(static_cast<T*>(out), static_cast<const T*>(v), numel, largest, stream);
  });
}

}  // namespace lets::cpu::LETS_ISA
