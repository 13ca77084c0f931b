// Moving averages, and what a perturbation makes of them. average: reads m, x; writes m and, where wanted, out.
// posterior ascent: reads s, g; writes out, s.
#include "block.h"

namespace lets::cuda {
namespace {

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
average_kernel(LETS_PARAMETER Batch<Capacity> batch, int32_t chunks, launch_of::average_ c, bool add) {
  using C = typename ArithmeticOf<T>::type;
  const bool begins = *c.updates == 0, go = *c.gate != 0;  // the count is raised when all have read it
  const C keeps = C(c.decay), takes = C(1 - c.decay), a = C(c.a), b = C(c.b);
  double mine = 0;
  for (int32_t k = int32_t(blockIdx.x); k < chunks; k += int32_t(gridDim.x)) {
    const Piece piece = piece_of(batch, k);
    const Run& run = batch.run[piece.run];
    T* m = reinterpret_cast<T*>(run.address[0]) + piece.begin;
    const T* x = reinterpret_cast<const T*>(run.address[1]) + piece.begin;
    T* out = run.address[2] ? reinterpret_cast<T*>(run.address[2]) + piece.begin : nullptr;
    over_in_order<T>(piece.numel, aligned(m) && aligned(x) && aligned(out), [&](auto width, int i) {
      constexpr int V = decltype(width)::value;
      Pack<T, V> v = read_only(&pack_at<V>(x, i));
      if (begins) {
        if (go) pack_at<V>(m, i) = v;
      } else {
        const auto fresh = widened<C>(v);
        Pack<T, V> kept = pack_at<V>(m, i);
        auto average = widened<C>(kept);
        if (go) {
#pragma unroll
          for (int j = 0; j < V; ++j) average.value[j] = combined(keeps, average.value[j], takes, fresh.value[j]);
          kept = narrowed<T>(average);
          pack_at<V>(m, i) = kept;
          average = widened<C>(kept);
        }
#pragma unroll
        for (int j = 0; j < V; ++j) average.value[j] = combined(a, fresh.value[j], b, average.value[j]);
        v = narrowed<T>(average);
      }
      if (out) pack_at<V>(out, i) = v;
      add_squares<C>(mine, v);
    });
  }
  keep(c.sums, mine, add);
}

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
ascent_kernel(LETS_PARAMETER Batch<Capacity> batch, launch_of::posterior_ascent_ c) {
  using C = typename ArithmeticOf<T>::type;
  const bool go = *c.gate != 0;
  const C keeps = C(c.beta2), takes = C(1 - c.beta2), more = C(c.damping);
  const Piece piece = piece_of(batch, int32_t(blockIdx.x));
  const Run& run = batch.run[piece.run];
  T* out = reinterpret_cast<T*>(run.address[0]) + piece.begin;
  T* s = reinterpret_cast<T*>(run.address[1]) + piece.begin;
  const T* g = reinterpret_cast<const T*>(run.address[2]) + piece.begin;
  over<T>(piece.numel, aligned(out) && aligned(s) && aligned(g), [&](auto width, int i) {
    constexpr int V = decltype(width)::value;
    auto gradient = fetch<C, V>(g, i), precision = load<C, V>(s, i);
    if (go) {
      Values<C, V> after;
#pragma unroll
      for (int j = 0; j < V; ++j)
        after.value[j] = precision_after(precision.value[j], gradient.value[j], keeps, takes, more);
      store<V>(s, i, after);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) gradient.value[j] = gradient.value[j] / precision.value[j];
    store<V>(out, i, gradient);
  });
}

}  // namespace

void average_(const launch_of::average_& c) {
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    sum_in_batches(c.runs, c.count, c.sums, c.stream, [&](const auto& batch, int32_t chunks, int blocks, bool add) {
      launch(&average_kernel<T, capacity_of<decltype(batch)>>, blocks, kThreads, c.stream, batch, chunks, c, add);
    });
  });
  advance(c.updates, c.gate, c.stream);
}

void posterior_ascent_(const launch_of::posterior_ascent_& c) {
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    in_batches(c.runs, c.count, pieces, [&](const auto& batch, int32_t chunks) {
      launch(&ascent_kernel<T, capacity_of<decltype(batch)>>, chunks, kThreads, c.stream, batch, c);
    });
  });
}

}  // namespace lets::cuda
