// Two vectors. dots: reads x, y; displacement_dots: reads g, theta, saved; they write nothing parameter-sized. combine:
// reads x, y; writes out, which may be one of them, so nothing there counts as read-only.
#include "block.h"

namespace lets::cuda {
namespace {

// x·x, x·y and y·y, as a thread adds them up.
struct Dots {
  double xx = 0, xy = 0, yy = 0;

  LETS_DEVICE void add(Dots& dots, double x, double y) {
    dots.xx += x * x;
    dots.xy += x * y;
    dots.yy += y * y;
  }
  LETS_DEVICE void keep(double* sums, const Dots& dots, bool add) {
    cuda::keep<Sum, 3>(sums, dots.xx, add, 0);
    cuda::keep<Sum, 3>(sums, dots.xy, add, 1);
    cuda::keep<Sum, 3>(sums, dots.yy, add, 2);
  }
};

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
dots_kernel(LETS_PARAMETER BatchOf<launch_of::dots, Capacity> batch, int32_t chunks, launch_of::dots c, bool add) {
  using C = Arithmetic<T>;
  Dots mine;
  over_share(batch, chunks, [&](const auto& piece) {
    const T *x = at<const T>(piece, 0), *y = at<const T>(piece, 1);
    over_in_order<T, 4>(piece, all_aligned(x, y), [&]<int V>(int i) {
      const auto u = fetch<C, V>(x, i), w = fetch<C, V>(y, i);
      each<V>([&](int j) { Dots::add(mine, double(u.value[j]), double(w.value[j])); });
    });
  });
  Dots::keep(c.sums, mine, add);
}

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
displacement_kernel(LETS_PARAMETER BatchOf<launch_of::displacement_dots, Capacity> batch, int32_t chunks,
                    launch_of::displacement_dots c, bool add) {
  using C = Arithmetic<T>;
  Dots mine;
  over_share(batch, chunks, [&](const auto& piece) {
    const T *g = at<const T>(piece, 0), *theta = at<const T>(piece, 1), *saved = at<const T>(piece, 2);
    over_in_order<T, 2>(piece, all_aligned(g, theta, saved), [&]<int V>(int i) {
      const auto x = fetch<C, V>(g, i), now = fetch<C, V>(theta, i), before = fetch<C, V>(saved, i);
      each<V>([&](int j) { Dots::add(mine, double(x.value[j]), double(displacement(now.value[j], before.value[j]))); });
    });
  });
  Dots::keep(c.sums, mine, add);
}

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
combine_kernel(LETS_PARAMETER BatchOf<launch_of::combine_, Capacity> batch, launch_of::combine_ c) {
  using C = Arithmetic<T>;
  if (*c.gate == 0) return;
  const C a = C(c.coefficients[0]), b = C(c.coefficients[1]);
  const auto piece = piece_of(batch, int32_t(blockIdx.x));
  T* out = at<T>(piece, 0);
  const T *x = at<const T>(piece, 1), *y = at<const T>(piece, 2);
  over<T>(piece, all_aligned(out, x, y), [&]<int V>(int i) {
    auto u = load<C, V>(x, i);
    const auto w = load<C, V>(y, i);
    each<V>([&](int j) { u.value[j] = combined(a, u.value[j], b, w.value[j]); });
    store<V>(out, i, u);
  });
}

}  // namespace

void dots(const launch_of::dots& c) {
  sum_of_chunks<3>(c, [&]<class T, int Capacity>() { return &dots_kernel<T, Capacity>; });
}

void displacement_dots(const launch_of::displacement_dots& c) {
  sum_of_chunks<3>(c, [&]<class T, int Capacity>() { return &displacement_kernel<T, Capacity>; });
}

void combine_(const launch_of::combine_& c) {
  on_chunks(c, [&]<class T, int Capacity>() { return &combine_kernel<T, Capacity>; });
}

}  // namespace lets::cuda
