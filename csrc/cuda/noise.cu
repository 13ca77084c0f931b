// Noise. Reads v and the precisions, where they are given; writes out.
#include "draw.h"

namespace lets::cuda {
namespace {

template <class T, bool Scaled, int Capacity>
LETS_KERNEL_FOR(3)
noise_kernel(LETS_PARAMETER Batch<Capacity> batch, int32_t chunks, launch_of::noise_ c, bool add) {
  using C = typename ArithmeticOf<T>::type;
  const Draw draw = draw_of(c.random, c.draws);
  const C weight = C(c.a), deviation = C(c.std);
  double mine = 0;
  for (int32_t k = int32_t(blockIdx.x); k < chunks; k += int32_t(gridDim.x)) {
    const Piece piece = piece_of(batch, k);
    const Run& run = batch.run[piece.run];
    T* out = reinterpret_cast<T*>(run.address[0]) + piece.begin;
    const T* v = run.address[1] ? reinterpret_cast<const T*>(run.address[1]) + piece.begin : nullptr;
    const T* s = run.address[2] ? reinterpret_cast<const T*>(run.address[2]) + piece.begin : nullptr;
    const int64_t position = position_of(run, piece);
    const auto scale = Scale<C, Scaled>::of(run, piece.begin, 0);
    over_in_order<T>(piece.numel, aligned(out) && aligned(v) && aligned(s), [&](auto width, int i) {
      constexpr int V = decltype(width)::value;
      const auto number = normals_at<V>(draw, position + i);
      Values<C, V> moved;
      if (s) {
        const auto precision = fetch<C, V>(s, i);
#pragma unroll
        for (int j = 0; j < V; ++j) moved.value[j] = deviation * (C(1) / square_root(precision.value[j]));
      } else if (Scaled && run.row_length > 0) {
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
  keep(c.sums, mine, add);
}

}  // namespace

void noise_(const launch_of::noise_& c) {
  // With precisions filters mean nothing, and no other T ever does.
  const bool scaled =
      std::any_of(c.runs, c.runs + c.count, [](const Run& run) { return run.row_length > 0 && !run.address[2]; });
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    sum_in_batches(c.runs, c.count, c.sums, c.stream, [&](const auto& batch, int32_t chunks, int blocks, bool add) {
      constexpr int capacity = capacity_of<decltype(batch)>;
      launch(scaled ? &noise_kernel<T, true, capacity> : &noise_kernel<T, false, capacity>, blocks, kThreads, c.stream,
             batch, chunks, c, add);
    });
  });
}

}  // namespace lets::cuda
