// The largest magnitude, and where it stands. largest: reads v. peaks: reads v; writes out.
#include "block.h"

namespace lets::cuda {
namespace {

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
largest_kernel(LETS_PARAMETER BatchOf<launch_of::largest, Capacity> batch, int32_t chunks, launch_of::largest c,
               bool add) {
  using C = Arithmetic<T>;
  C mine = 0;
  over_share(batch, chunks, [&](const auto& piece) {
    const T* v = at<const T>(piece, 0);
    over_in_order<T, 4>(piece, all_aligned(v), [&]<int V>(int i) {
      const auto x = fetch<C, V>(v, i);
      each<V>([&](int j) { mine = Largest::join(mine, absolute(x.value[j])); });
    });
  });
  keep<Largest>(c.sums, double(mine), add);
}

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
peaks_kernel(LETS_PARAMETER BatchOf<launch_of::peaks_, Capacity> batch, int32_t chunks, launch_of::peaks_ c, bool add) {
  using C = Arithmetic<T>;
  const double height = *c.largest;
  int64_t mine = 0;
  over_share(batch, chunks, [&](const auto& piece) {
    T* out = at<T>(piece, 0);
    const T* v = at<const T>(piece, 1);
    over_in_order<T>(piece, all_aligned(out, v), [&]<int V>(int i) {
      auto x = fetch<C, V>(v, i);
      each<V>([&](int j) {
        const bool peak = double(absolute(x.value[j])) == height;
        mine += peak;
        x.value[j] = peak ? dual(x.value[j], C(1)) : C(0);  // the sign
      });
      store<V>(out, i, x);
    });
  });
  keep(c.sums, double(mine), add);
}

}  // namespace

void largest(const launch_of::largest& c) {
  sum_of_chunks<1, Largest>(c, [&]<class T, int Capacity>() { return &largest_kernel<T, Capacity>; });
}

void peaks_(const launch_of::peaks_& c) {
  sum_of_chunks(c, [&]<class T, int Capacity>() { return &peaks_kernel<T, Capacity>; });
}

}  // namespace lets::cuda
