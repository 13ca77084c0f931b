// Normal noise for one chunk. Reads v and precisions where they are given; writes out.
#include "draw.h"

namespace lets::cpu::LETS_ISA {
namespace {

template <class T>
double walk(const chunk_of::noise_& c) {
  using C = Arithmetic<T>;
  Output<T> out(c.out, c.nontemporal);
  Input<T> v(c.vectors), precision(c.precisions);
  C norm_buffer[kBlock];
  float normal_buffer[kDrawn];
  const C factor = C(c.a), deviation = C(c.std);
  Sum sum;
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const float* normal = normals(c.draw, c.position + b, normal_buffer, n);
    C* to = result(out, b);
    if (c.precisions) {
      const C* p = load(precision, b, n);
      for (int64_t i = 0; i < n; ++i) to[i] = deviation * (C(1) / square_root(p[i])) * C(normal[i]);
    } else if (c.scaling.filter_length > 0) {
      filter_scales(c.scaling, b, C(0), norm_buffer, n);
      for (int64_t i = 0; i < n; ++i) to[i] = deviation * norm_buffer[i] * C(normal[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = deviation * C(normal[i]);
    }
    if (c.vectors) {
      const C* x = load(v, b, n);
      for (int64_t i = 0; i < n; ++i) to[i] = factor * x[i] + to[i];
    }
    Sum::add_squares(sum, n, keep(out, to, b, n));
  }
  finish(c.nontemporal);
  return Sum::total(sum);
}

}  // namespace

LETS_OP(noise_)

}  // namespace lets::cpu::LETS_ISA
