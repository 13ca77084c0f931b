// The radius gradient. Reads four gradients (theta as well where T needs it); writes nothing parameter-sized.
#include "block.h"

namespace lets::cuda {
namespace {

template <class T, Q Kind, bool Scaled, int Capacity>
LETS_KERNEL_FOR(2)
diagonal_kernel(LETS_PARAMETER Batch<Capacity> batch, int32_t chunks, launch_of::rho_grad_diagonal c, bool add) {
  using C = typename ArithmeticOf<T>::type;
  double mine = 0;
  for (int32_t k = int32_t(blockIdx.x); k < chunks; k += int32_t(gridDim.x)) {
    const Piece piece = piece_of(batch, k);
    const Run& run = batch.run[piece.run];
    auto at = [&](int list) {
      return run.address[list] ? reinterpret_cast<const T*>(run.address[list]) + piece.begin : nullptr;
    };
    const T *val = at(0), *train = at(1), *g_hat = at(2), *v = at(3);
    const T* theta = Scaled && run.row_length == kElementWise ? at(4) : nullptr;
    const auto scale = Scale<C, Scaled>::of(run, piece.begin, c.xi);
    const bool all_aligned = aligned(val) && aligned(train) && aligned(g_hat) && aligned(v) && aligned(theta);
    over_in_order<T>(piece.numel, all_aligned, [&](auto width, int i) {
      constexpr int V = decltype(width)::value;
      const auto a = fetch<C, V>(val, i), h = fetch<C, V>(g_hat, i), x = fetch<C, V>(v, i);
      const auto b = train ? fetch<C, V>(train, i) : Values<C, V>{};
      const auto t = Scale<C, Scaled>::at(scale, i, theta ? fetch<C, V>(theta, i) : x, x);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const C scaled = t.value[j] * x.value[j];
        double unit;
        if constexpr (Kind == Q::other) {
          unit = double(t.value[j]) * dual(double(scaled), c.q);  // a general power may underflow in float
        } else {
          unit = double(t.value[j] * dual_of<Kind>(scaled, C(c.q)));
        }
        mine += diagonal_share(double(a.value[j]) - double(b.value[j]), double(h.value[j]), unit);
      }
    });
  }
  keep(c.sums, mine, add);
}

template <class T, int Capacity>
LETS_KERNEL secant_kernel(LETS_PARAMETER Batch<Capacity> batch, int32_t chunks, launch_of::rho_grad_secant c,
                          bool add) {
  using C = typename ArithmeticOf<T>::type;
  double mine = 0;
  for (int32_t k = int32_t(blockIdx.x); k < chunks; k += int32_t(gridDim.x)) {
    const Piece piece = piece_of(batch, k);
    const Run& run = batch.run[piece.run];
    auto at = [&](int list) {
      return run.address[list] ? reinterpret_cast<const T*>(run.address[list]) + piece.begin : nullptr;
    };
    const T *val = at(0), *train = at(1), *g_hat = at(2), *g = at(3);
    const bool all_aligned = aligned(val) && aligned(train) && aligned(g_hat) && aligned(g);
    over_in_order<T>(piece.numel, all_aligned, [&](auto width, int i) {
      constexpr int V = decltype(width)::value;
      const auto a = fetch<C, V>(val, i), h = fetch<C, V>(g_hat, i), x = fetch<C, V>(g, i);
      const auto b = train ? fetch<C, V>(train, i) : Values<C, V>{};
#pragma unroll
      for (int j = 0; j < V; ++j)
        mine += secant_share(double(a.value[j]) - double(b.value[j]), double(h.value[j]), double(x.value[j]));
    });
  }
  keep(c.sums, mine, add);
}

}  // namespace

void rho_grad_diagonal(const launch_of::rho_grad_diagonal& c) {
  with_type(c.dtype, [&](auto type) {
    with_exponent(c.q, [&](auto kind) {
      with_scaling(c.runs, c.count, [&](auto scaled) {
        using T = decltype(type);
        sum_in_batches(c.runs, c.count, c.sums, c.stream, [&](const auto& batch, int32_t chunks, int blocks, bool add) {
          launch(&diagonal_kernel<T, decltype(kind)::value, decltype(scaled)::value, capacity_of<decltype(batch)>>,
                 blocks, kThreads, c.stream, batch, chunks, c, add);
        });
      });
    });
  });
}

void rho_grad_secant(const launch_of::rho_grad_secant& c) {
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    sum_in_batches(c.runs, c.count, c.sums, c.stream, [&](const auto& batch, int32_t chunks, int blocks, bool add) {
      launch(&secant_kernel<T, capacity_of<decltype(batch)>>, blocks, kThreads, c.stream, batch, chunks, c, add);
    });
  });
}

}  // namespace lets::cuda
