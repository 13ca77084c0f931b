// Noise. Reads v and the precisions, where they are given; writes out.
#include "draw.h"

namespace lets::cuda {
namespace {

template <class T, bool Scaled, int Capacity>
LETS_KERNEL_FOR(3)
noise_kernel(LETS_PARAMETER BatchOf<launch_of::noise_, Capacity> batch, int32_t chunks, launch_of::noise_ c, bool add) {
  using C = Arithmetic<T>;
  const Draw draw = draw_of(c.random, c.draws);
  const C weight = C(c.a), deviation = C(c.std);
  double mine = 0;
  over_share(batch, chunks, [&](const auto& piece) {
    T* out = at<T>(piece, 0);
    const T *v = maybe_at<const T>(piece, 1), *s = maybe_at<const T>(piece, 2);
    const int64_t position = position_of(piece);
    const auto scale = Scale<C, Scaled>::of(piece);
    over_in_order<T>(piece, all_aligned(out, v, s), [&]<int V>(int i) {
      const auto number = normals_at<V>(draw, position + i);
      Values<C, V> moved;
      if (s) {
        const auto precision = fetch<C, V>(s, i);
        each<V>([&](int j) { moved.value[j] = deviation * (C(1) / square_root(precision.value[j])); });
      } else if (Scaled && piece.each.filter_length > 0) {
        moved = Scale<C, Scaled>::template filters<V>(scale, i);
        each<V>([&](int j) { moved.value[j] = deviation * moved.value[j]; });
      } else {
        each<V>([&](int j) { moved.value[j] = deviation; });
      }
      each<V>([&](int j) { moved.value[j] = moved.value[j] * C(number.value[j]); });
      if (v) {
        const auto x = fetch<C, V>(v, i);
        each<V>([&](int j) { moved.value[j] = weight * x.value[j] + moved.value[j]; });
      }
      const auto stored = narrowed<T>(moved);
      pack_at<V>(out, i) = stored;
      add_squares<C>(mine, stored);
    });
  });
  keep(c.sums, mine, add);
}

}  // namespace

void noise_(const launch_of::noise_& c) {
  // With precisions filters mean nothing, and no other T ever does.
  bool scaled = false;
  for (int64_t i = 0; i < c.count; ++i) scaled = scaled || (c.each[i].filter_length > 0 && !c.runs[i].address[2]);
  sum_of_chunks(c, [scaled]<class T, int Capacity>() {
    return scaled ? &noise_kernel<T, true, Capacity> : &noise_kernel<T, false, Capacity>;
  });
}

}  // namespace lets::cuda
