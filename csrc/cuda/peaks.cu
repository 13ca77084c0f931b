// The largest magnitude, and where it stands. largest: reads v. peaks: reads v; writes out.
#include "block.h"

namespace lets::cuda {
namespace {

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
largest_kernel(LETS_PARAMETER Batch<Capacity> batch, int32_t chunks, launch_of::largest c, bool add) {
  using C = typename ArithmeticOf<T>::type;
  C mine = 0;
  for (int32_t k = int32_t(blockIdx.x); k < chunks; k += int32_t(gridDim.x)) {
    const Piece piece = piece_of(batch, k);
    const T* v = reinterpret_cast<const T*>(batch.run[piece.run].address[0]) + piece.begin;
    over_in_order<T>(piece.numel, aligned(v), [&](auto width, int i) {
      constexpr int V = decltype(width)::value;
      const auto x = fetch<C, V>(v, i);
#pragma unroll
      for (int j = 0; j < V; ++j) mine = Largest::join(mine, absolute(x.value[j]));
    });
  }
  keep<Largest>(c.sums, double(mine), add);
}

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
peaks_kernel(LETS_PARAMETER Batch<Capacity> batch, int32_t chunks, launch_of::peaks_ c, bool add) {
  using C = typename ArithmeticOf<T>::type;
  const double height = *c.largest;
  int64_t mine = 0;
  for (int32_t k = int32_t(blockIdx.x); k < chunks; k += int32_t(gridDim.x)) {
    const Piece piece = piece_of(batch, k);
    const Run& run = batch.run[piece.run];
    T* out = reinterpret_cast<T*>(run.address[0]) + piece.begin;
    const T* v = reinterpret_cast<const T*>(run.address[1]) + piece.begin;
    over_in_order<T>(piece.numel, aligned(out) && aligned(v), [&](auto width, int i) {
      constexpr int V = decltype(width)::value;
      auto x = fetch<C, V>(v, i);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const bool peak = double(absolute(x.value[j])) == height;
        mine += peak;
        x.value[j] = peak ? dual(x.value[j], C(1)) : C(0);  // the sign
      }
      store<V>(out, i, x);
    });
  }
  keep(c.sums, double(mine), add);
}

}  // namespace

void largest(const launch_of::largest& c) {
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    sum_in_batches<Largest>(
        c.runs, c.count, c.sums, c.stream, [&](const auto& batch, int32_t chunks, int blocks, bool add) {
          launch(&largest_kernel<T, capacity_of<decltype(batch)>>, blocks, kThreads, c.stream, batch, chunks, c, add);
        });
  });
}

void peaks_(const launch_of::peaks_& c) {
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    sum_in_batches(c.runs, c.count, c.sums, c.stream, [&](const auto& batch, int32_t chunks, int blocks, bool add) {
      launch(&peaks_kernel<T, capacity_of<decltype(batch)>>, blocks, kThreads, c.stream, batch, chunks, c, add);
    });
  });
}

}  // namespace lets::cuda
