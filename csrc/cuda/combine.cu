// Two vectors. dots: reads x, y; displacement_dots: reads g, theta, saved; they write nothing parameter-sized. combine:
// reads x, y; writes out, which may be one of them, so nothing there counts as read-only.
#include "block.h"

namespace lets::cuda {
namespace {

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
dots_kernel(LETS_PARAMETER Batch<Capacity> batch, int32_t chunks, launch_of::dots c, bool add) {
  using C = typename ArithmeticOf<T>::type;
  double xx = 0, xy = 0, yy = 0;
  for (int32_t k = int32_t(blockIdx.x); k < chunks; k += int32_t(gridDim.x)) {
    const Piece piece = piece_of(batch, k);
    const Run& run = batch.run[piece.run];
    const T* x = reinterpret_cast<const T*>(run.address[0]) + piece.begin;
    const T* y = reinterpret_cast<const T*>(run.address[1]) + piece.begin;
    over_in_order<T>(piece.numel, aligned(x) && aligned(y), [&](auto width, int i) {
      constexpr int V = decltype(width)::value;
      const auto u = fetch<C, V>(x, i), w = fetch<C, V>(y, i);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const double a = double(u.value[j]), b = double(w.value[j]);
        xx += a * a;
        xy += a * b;
        yy += b * b;
      }
    });
  }
  keep<Sum, 3>(c.sums, xx, add, 0);
  keep<Sum, 3>(c.sums, xy, add, 1);
  keep<Sum, 3>(c.sums, yy, add, 2);
}

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
displacement_kernel(LETS_PARAMETER Batch<Capacity> batch, int32_t chunks, launch_of::displacement_dots c, bool add) {
  using C = typename ArithmeticOf<T>::type;
  double gg = 0, gd = 0, dd = 0;
  for (int32_t k = int32_t(blockIdx.x); k < chunks; k += int32_t(gridDim.x)) {
    const Piece piece = piece_of(batch, k);
    const Run& run = batch.run[piece.run];
    const T* g = reinterpret_cast<const T*>(run.address[0]) + piece.begin;
    const T* theta = reinterpret_cast<const T*>(run.address[1]) + piece.begin;
    const T* saved = reinterpret_cast<const T*>(run.address[2]) + piece.begin;
    over_in_order<T>(piece.numel, aligned(g) && aligned(theta) && aligned(saved), [&](auto width, int i) {
      constexpr int V = decltype(width)::value;
      const auto x = fetch<C, V>(g, i), now = fetch<C, V>(theta, i), before = fetch<C, V>(saved, i);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const double a = double(x.value[j]), d = double(displacement(now.value[j], before.value[j]));
        gg += a * a;
        gd += a * d;
        dd += d * d;
      }
    });
  }
  keep<Sum, 3>(c.sums, gg, add, 0);
  keep<Sum, 3>(c.sums, gd, add, 1);
  keep<Sum, 3>(c.sums, dd, add, 2);
}

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
combine_kernel(LETS_PARAMETER Batch<Capacity> batch, launch_of::combine_ c) {
  using C = typename ArithmeticOf<T>::type;
  if (*c.gate == 0) return;
  const C a = C(c.coefficients[0]), b = C(c.coefficients[1]);
  const Piece piece = piece_of(batch, int32_t(blockIdx.x));
  const Run& run = batch.run[piece.run];
  T* out = reinterpret_cast<T*>(run.address[0]) + piece.begin;
  const T* x = reinterpret_cast<const T*>(run.address[1]) + piece.begin;
  const T* y = reinterpret_cast<const T*>(run.address[2]) + piece.begin;
  over<T>(piece.numel, aligned(out) && aligned(x) && aligned(y), [&](auto width, int i) {
    constexpr int V = decltype(width)::value;
    auto u = load<C, V>(x, i);
    const auto w = load<C, V>(y, i);
#pragma unroll
    for (int j = 0; j < V; ++j) u.value[j] = combined(a, u.value[j], b, w.value[j]);
    store<V>(out, i, u);
  });
}

}  // namespace

void dots(const launch_of::dots& c) {
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    const auto one = [&](const auto& batch, int32_t chunks, int blocks, bool add) {
      launch(&dots_kernel<T, capacity_of<decltype(batch)>>, blocks, kThreads, c.stream, batch, chunks, c, add);
    };
    sum_in_batches(c.runs, c.count, c.sums, c.stream, one, 3);
  });
}

void displacement_dots(const launch_of::displacement_dots& c) {
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    const auto one = [&](const auto& batch, int32_t chunks, int blocks, bool add) {
      launch(&displacement_kernel<T, capacity_of<decltype(batch)>>, blocks, kThreads, c.stream, batch, chunks, c, add);
    };
    sum_in_batches(c.runs, c.count, c.sums, c.stream, one, 3);
  });
}

void combine_(const launch_of::combine_& c) {
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    in_batches(c.runs, c.count, pieces, [&](const auto& batch, int32_t chunks) {
      launch(&combine_kernel<T, capacity_of<decltype(batch)>>, chunks, kThreads, c.stream, batch, c);
    });
  });
}

}  // namespace lets::cuda
