// The radius gradient. Reads four gradients (theta as well where T needs it); writes nothing parameter-sized.
#include "block.h"

namespace lets::cuda {
namespace {

template <class T, bool Scaled, Q Kind, int Capacity>
LETS_KERNEL_FOR(2)
diagonal_kernel(LETS_PARAMETER BatchOf<launch_of::rho_grad_diagonal, Capacity> batch, int32_t chunks,
                launch_of::rho_grad_diagonal c, bool add) {
  using C = Arithmetic<T>;
  double mine = 0;
  over_share(batch, chunks, [&](const auto& piece) {
    const T *val = at<const T>(piece, 0), *train = maybe_at<const T>(piece, 1), *g_hat = at<const T>(piece, 2);
    const T* v = at<const T>(piece, 3);
    const T* theta = Scaled && piece.each.filter_length == kElementWise ? at<const T>(piece, 4) : nullptr;
    const auto scale = Scale<C, Scaled>::of(piece);
    over_in_order<T>(piece, all_aligned(val, train, g_hat, v, theta), [&]<int V>(int i) {
      const auto a = fetch<C, V>(val, i), h = fetch<C, V>(g_hat, i), x = fetch<C, V>(v, i);
      const auto b = train ? fetch<C, V>(train, i) : Values<C, V>{};
      const auto t = Scale<C, Scaled>::at(scale, i, theta ? fetch<C, V>(theta, i) : x, x);
      each<V>([&](int j) {
        const C scaled = t.value[j] * x.value[j];
        double unit;
        if constexpr (Kind == Q::other) {
          unit = double(t.value[j]) * dual(double(scaled), c.q);  // a general power may underflow in float
        } else {
          unit = double(t.value[j] * dual_of<Kind>(scaled, C(c.q)));
        }
        mine += diagonal_share(double(a.value[j]) - double(b.value[j]), double(h.value[j]), unit);
      });
    });
  });
  keep(c.sums, mine, add);
}

template <class T, int Capacity>
LETS_KERNEL secant_kernel(LETS_PARAMETER BatchOf<launch_of::rho_grad_secant, Capacity> batch, int32_t chunks,
                          launch_of::rho_grad_secant c, bool add) {
  using C = Arithmetic<T>;
  double mine = 0;
  over_share(batch, chunks, [&](const auto& piece) {
    const T *val = at<const T>(piece, 0), *train = maybe_at<const T>(piece, 1), *g_hat = at<const T>(piece, 2);
    const T* g = at<const T>(piece, 3);
    over_in_order<T>(piece, all_aligned(val, train, g_hat, g), [&]<int V>(int i) {
      const auto a = fetch<C, V>(val, i), h = fetch<C, V>(g_hat, i), x = fetch<C, V>(g, i);
      const auto b = train ? fetch<C, V>(train, i) : Values<C, V>{};
      each<V>([&](int j) {
        mine += secant_share(double(a.value[j]) - double(b.value[j]), double(h.value[j]), double(x.value[j]));
      });
    });
  });
  keep(c.sums, mine, add);
}

}  // namespace

void rho_grad_diagonal(const launch_of::rho_grad_diagonal& c) {
  with_cases(c, [&]<bool Scaled, Q Kind>() {
    sum_of_chunks(c, [&]<class T, int Capacity>() { return &diagonal_kernel<T, Scaled, Kind, Capacity>; });
  });
}

void rho_grad_secant(const launch_of::rho_grad_secant& c) {
  sum_of_chunks(c, [&]<class T, int Capacity>() { return &secant_kernel<T, Capacity>; });
}

}  // namespace lets::cuda
