// Noise. Reads v and the precisions, where they are given; writes out.
#include "draw.h"

namespace lets::cuda {
namespace {

template <class T, bool Scaled, int Capacity>
LETS_KERNEL_FOR(3)
noise_kernel(LETS_PARAMETER Batch<Capacity> batch, int32_t chunks, const int64_t* random, uint32_t draws, double a,
             double std, double* sums, bool add) {
  using C = typename ArithmeticOf<T>::type;
  const Draw draw = draw_of(random, draws);
  const C weight = C(a), deviation = C(std);
  double mine = 0;
  for (int32_t c = int32_t(blockIdx.x); c < chunks; c += int32_t(gridDim.x)) {
    const Piece piece = piece_of(batch, c);
    const Row& row = batch.row[piece.row];
    T* out = reinterpret_cast<T*>(row.address[0]) + piece.begin;
    const T* v = row.address[1] ? reinterpret_cast<const T*>(row.address[1]) + piece.begin : nullptr;
    const T* s = row.address[2] ? reinterpret_cast<const T*>(row.address[2]) + piece.begin : nullptr;
    const int64_t position = position_of(row, piece);
    const auto scale = Scale<C, Scaled>::of(row, piece.begin, 0);
    over_in_order<T>(piece.numel, aligned(out) && aligned(v) && aligned(s), [&](auto width, int i) {
      constexpr int V = decltype(width)::value;
      const auto number = normals_at<V>(draw, position + i);
      Values<C, V> moved;
      if (s) {
        const auto precision = fetch<C, V>(s, i);
#pragma unroll
        for (int j = 0; j < V; ++j) moved.value[j] = deviation * (C(1) / square_root(precision.value[j]));
      } else if (Scaled && row.row_length > 0) {
        moved = Scale<C, Scaled>::template filters<V>(scale, i);
#pragma unroll
        for (int j = 0; j < V; ++j) moved.value[j] = deviation * moved.value[j];
      } else {
#pragma unroll
        for (int j = 0; j < V; ++j) moved.value[j] = deviation;
      }
#pragma unroll
      for (int j = 0; j < V; ++j) moved.value[j] = moved.value[j] * C(number.value[j]);
      if (v) {
        const auto x = fetch<C, V>(v, i);
#pragma unroll
        for (int j = 0; j < V; ++j) moved.value[j] = weight * x.value[j] + moved.value[j];
      }
      const auto stored = narrowed<T>(moved);
      pack_at<V>(out, i) = stored;
      add_squares<C>(mine, stored);
    });
  }
  keep(sums, mine, add);
}

}  // namespace

void noise(Dtype dtype, const Row* rows, int64_t count, const int64_t* random, uint32_t draws, double a, double std,
           double* sums, void* stream) {
  with_type(dtype, [&](auto type) {
    with_scaling(rows, count, [&](auto scaled) {
      using T = decltype(type);
      sum_in_batches(rows, count, sums, stream, [&](const auto& batch, int32_t chunks, int blocks, bool add) {
        launch(&noise_kernel<T, decltype(scaled)::value, capacity_of<decltype(batch)>>, blocks, kThreads, stream, batch,
               chunks, random, draws, a, std, sums, add);
      });
    });
  });
}

}  // namespace lets::cuda
