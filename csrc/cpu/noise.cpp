// Normal noise for one chunk. Reads v and precisions where they are given; writes out.
#include "draw.h"

namespace lets::cpu::LETS_ISA {
namespace {

template <class T>
double noise_of(T* out, const T* v, const T* precision, int64_t numel, const Scaling& s, const Draw& draw,
                int64_t position, double a, double std, bool stream) {
  using C = typename ArithmeticOf<T>::type;
  C v_buffer[kBlock], s_buffer[kBlock], out_buffer[kBlock];
  T narrow_buffer[kBlock];
  float normal_buffer[kDrawn];
  const C factor = C(a), deviation = C(std);
  Sum sum;
  for (int64_t b = 0; b < numel; b += kBlock) {
    const int64_t n = smaller(kBlock, numel - b);
    const float* normal = normals(draw, position + b, normal_buffer, n);
    C* to = result<C>(out + b, out_buffer, stream);
    if (precision) {
      const C* p = load<C>(precision + b, s_buffer, n);
      for (int64_t i = 0; i < n; ++i) to[i] = deviation * (C(1) / square_root(p[i])) * C(normal[i]);
    } else if (s.row_length > 0) {
      filter_scales(s, b, C(0), s_buffer, n);
      for (int64_t i = 0; i < n; ++i) to[i] = deviation * s_buffer[i] * C(normal[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = deviation * C(normal[i]);
    }
    if (v) {
      const C* x = load<C>(v + b, v_buffer, n);
      for (int64_t i = 0; i < n; ++i) to[i] = factor * x[i] + to[i];
    }
    const C* moved = keep<C>(out + b, to, narrow_buffer, n, stream);
    Sum::add(sum, n, [=](int64_t i) { return double(moved[i]) * double(moved[i]); });
  }
  finish(stream);
  return Sum::total(sum);
}

}  // namespace

double noise(Dtype dtype, void* out, const void* v, const void* precision, int64_t numel, const Scaling& s,
             const Draw& draw, int64_t position, double a, double std, bool stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return noise_of(static_cast<T*>(out), static_cast<const T*>(v), static_cast<const T*>(precision), numel, s, draw,
                    position, a, std, stream);
  });
}

}  // namespace lets::cpu::LETS_ISA
