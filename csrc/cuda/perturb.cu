// Perturb and restore. perturb: reads theta, v (which may stand in saved); writes theta, saved. restore: reads saved;
// writes theta.
#include "block.h"

namespace lets::cuda {
namespace {

constexpr int kRho = 3;  // the radius of a run

template <class T, bool Scaled, Q Kind, int Capacity>
LETS_KERNEL_FOR(Kind == Q::other || (Scaled && sizeof(T) != 4) ? 2 : 4)
perturb_kernel(LETS_PARAMETER BatchOf<launch_of::perturb_, Capacity> batch, launch_of::perturb_ c) {
  using C = Arithmetic<T>;
  LETS_SHARED C shared[2];
  const auto piece = piece_of(batch, int32_t(blockIdx.x));
  if (threadIdx.x == 0) {
    const double rho = *reinterpret_cast<const double*>(piece.run.address[kRho]);
    const auto scale = perturbation_scale<C>(*c.total, rho, c.q);
    shared[0] = scale.length;
    shared[1] = scale.shrink;
    if (blockIdx.x == 0) *c.dirty = 1;
  }
  __syncthreads();
  const C length = shared[0], shrink = shared[1], exponent = C(c.q);
  T *theta = at<T>(piece, 0), *saved = at<T>(piece, 2);
  const bool swapped = piece.run.address[1] == nullptr;  // v stands in `saved`, which takes the weights
  const T* v = swapped ? saved : at<const T>(piece, 1);
  const auto scale = Scale<C, Scaled>::of(piece);
  const bool by_pack = all_aligned(theta, v, saved);
  if (length == 0) {  // decided here, not in the loop, where the load of v would wait for that of theta
    over<T>(piece, by_pack, [&]<int V>(int i) { pack_at<V>(saved, i) = pack_at<V>(theta, i); });
    return;
  }
  over<T>(piece, by_pack, [&]<int V>(int i) {
    const auto x = swapped ? load<C, V>(v, i) : fetch<C, V>(v, i);
    const Pack<T, V> old = pack_at<V>(theta, i);
    pack_at<V>(saved, i) = old;
    auto weights = widened<C>(old);
    const auto t = Scale<C, Scaled>::at(scale, i, weights, x);
    each<V>([&](int j) {
      // T = 1 multiplies exactly, so plain runs need no path of their own.
      const C scaled = t.value[j] * x.value[j];
      const C unit = dual_of<Kind>(Kind == Q::other ? shrink * scaled : scaled, exponent);
      weights.value[j] = weights.value[j] + length * (t.value[j] * unit);
    });
    store<V>(theta, i, weights);
  });
}

template <class T, int Capacity>
LETS_KERNEL restore_kernel(LETS_PARAMETER BatchOf<launch_of::restore_, Capacity> batch, launch_of::restore_ c) {
  if (*c.dirty == 0) return;
  const auto piece = piece_of(batch, int32_t(blockIdx.x));
  T* theta = at<T>(piece, 0);
  const T* saved = at<const T>(piece, 1);
  over<T>(piece, all_aligned(theta, saved),
          [&]<int V>(int i) { pack_at<V>(theta, i) = read_only(&pack_at<V>(saved, i)); });
}

}  // namespace

void perturb_(const launch_of::perturb_& c) {
  if (std::none_of(c.runs, c.runs + c.count, pieces))
    return set(c.dirty, 1, c.stream);  // without chunks no block sets it
  with_cases(c, [&]<bool Scaled, Q Kind>() {
    on_chunks(c, [&]<class T, int Capacity>() { return &perturb_kernel<T, Scaled, Kind, Capacity>; });
  });
}

void restore_(const launch_of::restore_& c) {
  on_chunks(c, [&]<class T, int Capacity>() { return &restore_kernel<T, Capacity>; });
  set(c.dirty, 0, c.stream);
}

}  // namespace lets::cuda
