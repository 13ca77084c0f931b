// The largest magnitude, and where it stands. largest: reads v. peaks: reads v; writes out.
#include "block.h"

namespace lets::cuda {
namespace {

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
largest_kernel(LETS_PARAMETER Batch<Capacity> batch, int32_t chunks, double* sums, bool add) {
  using C = typename ArithmeticOf<T>::type;
  C mine = 0;
  for (int32_t c = int32_t(blockIdx.x); c < chunks; c += int32_t(gridDim.x)) {
    const Piece piece = piece_of(batch, c);
    const T* v = reinterpret_cast<const T*>(batch.row[piece.row].address[0]) + piece.begin;
    over_in_order<T>(piece.numel, aligned(v), [&](auto width, int i) {
      constexpr int V = decltype(width)::value;
      const auto x = fetch<C, V>(v, i);
#pragma unroll
      for (int j = 0; j < V; ++j) mine = Largest::join(mine, absolute(x.value[j]));
    });
  }
  keep<Largest>(sums, double(mine), add);
}

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
peaks_kernel(LETS_PARAMETER Batch<Capacity> batch, int32_t chunks, const double* largest, double* sums, bool add) {
  using C = typename ArithmeticOf<T>::type;
  const double height = *largest;
  int64_t mine = 0;
  for (int32_t c = int32_t(blockIdx.x); c < chunks; c += int32_t(gridDim.x)) {
    const Piece piece = piece_of(batch, c);
    const Row& row = batch.row[piece.row];
    T* out = reinterpret_cast<T*>(row.address[0]) + piece.begin;
    const T* v = reinterpret_cast<const T*>(row.address[1]) + piece.begin;
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
  keep(sums, double(mine), add);
}

}  // namespace

void largest(Dtype dtype, const Row* rows, int64_t count, double* sums, void* stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    sum_in_batches<Largest>(rows, count, sums, stream, [&](const auto& batch, int32_t chunks, int blocks, bool add) {
      launch(&largest_kernel<T, capacity_of<decltype(batch)>>, blocks, kThreads, stream, batch, chunks, sums, add);
    });
  });
}

void peaks(Dtype dtype, const Row* rows, int64_t count, const double* largest, double* sums, void* stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    sum_in_batches(rows, count, sums, stream, [&](const auto& batch, int32_t chunks, int blocks, bool add) {
      launch(&peaks_kernel<T, capacity_of<decltype(batch)>>, blocks, kThreads, stream, batch, chunks, largest, sums,
             add);
    });
  });
}

}  // namespace lets::cuda
