// Moving averages, and what a perturbation makes of them. average: reads m, x; writes m and, where wanted, out.
// posterior ascent: reads s, g; writes out, s.
#include "block.h"

namespace lets::cuda {
namespace {

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
average_kernel(LETS_PARAMETER Batch<Capacity> batch, int32_t chunks, double decay, double share, double weight_x,
               double weight_m, const int64_t* updates, const double* gate, double* sums, bool add) {
  using C = typename ArithmeticOf<T>::type;
  const bool begins = *updates == 0, go = *gate != 0;  // the count is raised when all have read it
  const C keeps = C(decay), takes = C(share), a = C(weight_x), b = C(weight_m);
  double mine = 0;
  for (int32_t c = int32_t(blockIdx.x); c < chunks; c += int32_t(gridDim.x)) {
    const Piece piece = piece_of(batch, c);
    const Row& row = batch.row[piece.row];
    T* m = reinterpret_cast<T*>(row.address[0]) + piece.begin;
    const T* x = reinterpret_cast<const T*>(row.address[1]) + piece.begin;
    T* out = row.address[2] ? reinterpret_cast<T*>(row.address[2]) + piece.begin : nullptr;
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
  keep(sums, mine, add);
}

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
ascent_kernel(LETS_PARAMETER Batch<Capacity> batch, double beta2, double damping, const double* gate) {
  using C = typename ArithmeticOf<T>::type;
  const bool go = *gate != 0;
  const C keeps = C(beta2), takes = C(1 - beta2), more = C(damping);
  const Piece piece = piece_of(batch, int32_t(blockIdx.x));
  const Row& row = batch.row[piece.row];
  T* out = reinterpret_cast<T*>(row.address[0]) + piece.begin;
  T* s = reinterpret_cast<T*>(row.address[1]) + piece.begin;
  const T* g = reinterpret_cast<const T*>(row.address[2]) + piece.begin;
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

void average(Dtype dtype, const Row* rows, int64_t count, double decay, double a, double b, int64_t* updates,
             const double* gate, double* sums, void* stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    sum_in_batches(rows, count, sums, stream, [&](const auto& batch, int32_t chunks, int blocks, bool add) {
      launch(&average_kernel<T, capacity_of<decltype(batch)>>, blocks, kThreads, stream, batch, chunks, decay,
             1 - decay, a, b, static_cast<const int64_t*>(updates), gate, sums, add);
    });
  });
  advance(updates, gate, stream);
}

void posterior_ascent(Dtype dtype, const Row* rows, int64_t count, double beta2, double damping, const double* gate,
                      void* stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    in_batches(rows, count, pieces, [&](const auto& batch, int32_t chunks) {
      launch(&ascent_kernel<T, capacity_of<decltype(batch)>>, chunks, kThreads, stream, batch, beta2, damping, gate);
    });
  });
}

}  // namespace lets::cuda
