// Moving averages, and what a perturbation makes of them. average: reads m, x; writes m and, where wanted, out.
// posterior ascent: reads s, g; writes out, s.
#include "block.h"

namespace lets::cuda {
namespace {

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
average_kernel(LETS_PARAMETER BatchOf<launch_of::average_, Capacity> batch, int32_t chunks, launch_of::average_ c,
               bool add) {
  using C = Arithmetic<T>;
  const bool begins = *c.updates == 0, go = *c.gate != 0;  // the count is raised when all have read it
  const C keeps = C(c.decay), takes = C(1 - c.decay), a = C(c.a), b = C(c.b);
  double mine = 0;
  over_share(batch, chunks, [&](const auto& piece) {
    T *m = at<T>(piece, 0), *out = maybe_at<T>(piece, 2);
    const T* x = at<const T>(piece, 1);
    over_in_order<T>(piece, all_aligned(m, x, out), [&]<int V>(int i) {
      Pack<T, V> v = read_only(&pack_at<V>(x, i));
      if (begins) {
        if (go) pack_at<V>(m, i) = v;
      } else {
        const auto fresh = widened<C>(v);
        Pack<T, V> kept = pack_at<V>(m, i);
        auto average = widened<C>(kept);
        if (go) {
          each<V>([&](int j) { average.value[j] = combined(keeps, average.value[j], takes, fresh.value[j]); });
          kept = narrowed<T>(average);
          pack_at<V>(m, i) = kept;
          average = widened<C>(kept);
        }
        each<V>([&](int j) { average.value[j] = combined(a, fresh.value[j], b, average.value[j]); });
        v = narrowed<T>(average);
      }
      if (out) pack_at<V>(out, i) = v;
      add_squares<C>(mine, v);
    });
  });
  keep(c.sums, mine, add);
}

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
ascent_kernel(LETS_PARAMETER BatchOf<launch_of::posterior_ascent_, Capacity> batch, launch_of::posterior_ascent_ c) {
  using C = Arithmetic<T>;
  const bool go = *c.gate != 0;
  const auto piece = piece_of(batch, int32_t(blockIdx.x));
  const C keeps = C(c.beta2), takes = C(1 - c.beta2), more = C(piece.each.damping);
  T *out = at<T>(piece, 0), *s = at<T>(piece, 1);
  const T* g = at<const T>(piece, 2);
  over<T>(piece, all_aligned(out, s, g), [&]<int V>(int i) {
    auto gradient = fetch<C, V>(g, i), precision = load<C, V>(s, i);
    if (go) {
      Values<C, V> after;
      each<V>(
          [&](int j) { after.value[j] = precision_after(precision.value[j], gradient.value[j], keeps, takes, more); });
      store<V>(s, i, after);
    }
    each<V>([&](int j) { gradient.value[j] = gradient.value[j] / precision.value[j]; });
    store<V>(out, i, gradient);
  });
}

}  // namespace

void average_(const launch_of::average_& c) {
  sum_of_chunks(c, [&]<class T, int Capacity>() { return &average_kernel<T, Capacity>; });
  advance(c.updates, c.gate, c.stream);
}

void posterior_ascent_(const launch_of::posterior_ascent_& c) {
  on_chunks(c, [&]<class T, int Capacity>() { return &ascent_kernel<T, Capacity>; });
}

}  // namespace lets::cuda
