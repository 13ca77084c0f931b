// Perturb and restore. perturb: reads theta, v (which may stand in saved); writes theta, saved. restore: reads saved;
// writes theta.
#include "block.h"

namespace lets::cuda {
namespace {

template <class T, Q Kind, bool Scaled, int Capacity>
LETS_KERNEL_FOR(Kind == Q::other || (Scaled && sizeof(T) != 4) ? 2 : 4)
perturb_kernel(LETS_PARAMETER Batch<Capacity> batch, launch_of::perturb_ c) {
  using C = typename ArithmeticOf<T>::type;
  LETS_SHARED C shared[2];
  if (threadIdx.x == 0) {
    const auto scale = perturbation_scale<C>(*c.total, *c.rho, c.q);
    shared[0] = scale.length;
    shared[1] = scale.shrink;
    if (blockIdx.x == 0) *c.dirty = 1;
  }
  __syncthreads();
  const C length = shared[0], shrink = shared[1], exponent = C(c.q);
  const Piece piece = piece_of(batch, int32_t(blockIdx.x));
  const Run& run = batch.run[piece.run];
  T* theta = reinterpret_cast<T*>(run.address[0]) + piece.begin;
  T* saved = reinterpret_cast<T*>(run.address[2]) + piece.begin;
  const bool swapped = run.address[1] == nullptr;  // v stands in `saved`, which takes the weights
  const T* v = swapped ? saved : reinterpret_cast<const T*>(run.address[1]) + piece.begin;
  const auto scale = Scale<C, Scaled>::of(run, piece.begin, c.xi);
  const bool all_aligned = aligned(theta) && aligned(v) && aligned(saved);
  if (length == 0) {  // decided here, not in the loop, where the load of v would wait for that of theta
    over<T>(piece.numel, all_aligned, [&](auto width, int i) {
      constexpr int V = decltype(width)::value;
      pack_at<V>(saved, i) = pack_at<V>(theta, i);
    });
    return;
  }
  over<T>(piece.numel, all_aligned, [&](auto width, int i) {
    constexpr int V = decltype(width)::value;
    const auto x = swapped ? load<C, V>(v, i) : fetch<C, V>(v, i);
    const Pack<T, V> old = pack_at<V>(theta, i);
    pack_at<V>(saved, i) = old;
    auto weights = widened<C>(old);
    const auto t = Scale<C, Scaled>::at(scale, i, weights, x);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      // T = 1 multiplies exactly, so plain runs need no path of their own.
      const C scaled = t.value[j] * x.value[j];
      const C unit = dual_of<Kind>(Kind == Q::other ? shrink * scaled : scaled, exponent);
      weights.value[j] = weights.value[j] + length * (t.value[j] * unit);
    }
    store<V>(theta, i, weights);
  });
}

template <class T, int Capacity>
LETS_KERNEL restore_kernel(LETS_PARAMETER Batch<Capacity> batch, launch_of::restore_ c) {
  if (*c.dirty == 0) return;
  const Piece piece = piece_of(batch, int32_t(blockIdx.x));
  const Run& run = batch.run[piece.run];
  T* theta = reinterpret_cast<T*>(run.address[0]) + piece.begin;
  const T* saved = reinterpret_cast<const T*>(run.address[1]) + piece.begin;
  over<T>(piece.numel, aligned(theta) && aligned(saved), [&](auto width, int i) {
    constexpr int V = decltype(width)::value;
    pack_at<V>(theta, i) = read_only(&pack_at<V>(saved, i));
  });
}

}  // namespace

void perturb_(const launch_of::perturb_& c) {
  if (std::none_of(c.runs, c.runs + c.count, pieces)) return set(c.dirty, 1, c.stream);  // no block would
  with_type(c.dtype, [&](auto type) {
    with_exponent(c.q, [&](auto kind) {
      with_scaling(c.runs, c.count, [&](auto scaled) {
        using T = decltype(type);
        in_batches(c.runs, c.count, pieces, [&](const auto& batch, int32_t chunks) {
          launch(&perturb_kernel<T, decltype(kind)::value, decltype(scaled)::value, capacity_of<decltype(batch)>>,
                 chunks, kThreads, c.stream, batch, c);
        });
      });
    });
  });
}

void restore_(const launch_of::restore_& c) {
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    in_batches(c.runs, c.count, pieces, [&](const auto& batch, int32_t chunks) {
      launch(&restore_kernel<T, capacity_of<decltype(batch)>>, chunks, kThreads, c.stream, batch, c);
    });
  });
  set(c.dirty, 0, c.stream);
}

}  // namespace lets::cuda
