// Normal noise for one chunk. Reads v and precisions where they are given; writes out.
#include "draw.h"

namespace lets::cpu::LETS_ISA {
namespace {

template <class T>
double noise_of(const chunk_of::noise_& c) {
  auto* const out = static_cast<T*>(c.out);
  auto* const v = static_cast<const T*>(c.vectors);
  auto* const precision = static_cast<const T*>(c.precisions);
  using C = typename ArithmeticOf<T>::type;
  C v_buffer[kBlock], s_buffer[kBlock], out_buffer[kBlock];
  T narrow_buffer[kBlock];
  float normal_buffer[kDrawn];
  const C factor = C(c.a), deviation = C(c.std);
  Sum sum;
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const float* normal = normals(c.draw, c.position + b, normal_buffer, n);
    C* to = result<C>(out + b, out_buffer, c.nontemporal);
    if (precision) {
      const C* p = load<C>(precision + b, s_buffer, n);
      for (int64_t i = 0; i < n; ++i) to[i] = deviation * (C(1) / square_root(p[i])) * C(normal[i]);
    } else if (c.scaling.row_length > 0) {
      filter_scales(c.scaling, b, C(0), s_buffer, n);
      for (int64_t i = 0; i < n; ++i) to[i] = deviation * s_buffer[i] * C(normal[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = deviation * C(normal[i]);
    }
    if (v) {
      const C* x = load<C>(v + b, v_buffer, n);
      for (int64_t i = 0; i < n; ++i) to[i] = factor * x[i] + to[i];
    }
    const C* moved = keep<C>(out + b, to, narrow_buffer, n, c.nontemporal);
    Sum::add(sum, n, [=](int64_t i) { return double(moved[i]) * double(moved[i]); });
  }
  finish(c.nontemporal);
  return Sum::total(sum);
}

}  // namespace

double noise_(const chunk_of::noise_& c) {
  return with_type(c.dtype, [&](auto type) { return noise_of<decltype(type)>(c); });
}

}  // namespace lets::cpu::LETS_ISA
