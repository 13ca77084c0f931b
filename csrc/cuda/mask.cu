// Masks. masked: reads v and the mask, where it is given; writes out. count: reads v, where given, and the mask.
// select: the same, and writes the mask.
#include "draw.h"

namespace lets::cuda {
namespace {

template <class T, bool Drawn, int Capacity>
LETS_KERNEL_FOR(4)
masked_kernel(LETS_PARAMETER BatchOf<launch_of::masked_, Capacity> batch, int32_t chunks, launch_of::masked_ c,
              bool add) {
  using C = Arithmetic<T>;
  const Draw draw = draw_of(c.random, c.draws);
  const uint64_t limit = word_limit(c.share);
  const C enlarge = C(1 / c.share);
  double mine = 0;
  over_share(batch, chunks, [&](const auto& piece) {
    T* out = at<T>(piece, 0);
    const T* v = at<const T>(piece, 1);
    const uint8_t* mask = Drawn ? nullptr : at<const uint8_t>(piece, 2);
    const int64_t position = position_of(piece);
    over_in_order<T>(piece, all_aligned(out, v, mask), [&]<int V>(int i) {
      const Pack<T, V> whole = read_only(&pack_at<V>(v, i));
      add_squares<C>(mine, whole);
      Pack<T, V> kept;
      if constexpr (Drawn) {
        const auto words = words_at<V>(draw, position + i);
        auto x = widened<C>(whole);
        each<V>([&](int j) { x.value[j] = words.value[j] < limit ? x.value[j] * enlarge : C(0); });
        kept = narrowed<T>(x);
      } else {
        const auto own = read_only(&pack_at<V>(mask, i));
        each<V>([&](int j) { kept.value[j] = own.value[j] ? whole.value[j] : T{}; });
      }
      pack_at<V>(out, i) = kept;
    });
  });
  keep(c.sums, mine, add);
}

// Whether the elements i … i + V - 1 have keys above the threshold. Words are drawn only where they can decide.
template <int V, class T>
LETS_DEVICE Values<bool, V> above_at(const T* v, int i, const Draw& draw, int64_t position, int64_t threshold) {
  Values<bool, V> above;
  if (!v) {
    const auto words = words_at<V>(draw, position);
    each<V>([&](int j) { above.value[j] = key_of(words.value[j]) > threshold; });
    return above;
  }
  const auto x = fetch<float, V>(v, i);
  bool decided = true;
  each<V>([&](int j) {
    above.value[j] = key_of(x.value[j], 0) > threshold;
    decided = decided && above.value[j] == (key_of(x.value[j], 0xffffffffu) > threshold);
  });
  if (decided) return above;
  const auto words = words_at<V>(draw, position);
  each<V>([&](int j) { above.value[j] = key_of(x.value[j], words.value[j]) > threshold; });
  return above;
}

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
count_above_kernel(LETS_PARAMETER BatchOf<launch_of::count_above, Capacity> batch, int32_t chunks,
                   launch_of::count_above c, bool add) {
  const Draw draw = draw_of(c.random, c.draws);
  const int64_t threshold = *c.threshold;
  int64_t mine = 0;
  over_share(batch, chunks, [&](const auto& piece) {
    const T* v = maybe_at<const T>(piece, 0);
    const uint8_t* mask = at<const uint8_t>(piece, 1);
    const int64_t position = position_of(piece);
    over_in_order<T>(piece, all_aligned(v, mask), [&]<int V>(int i) {
      const auto above = above_at<V>(v, i, draw, position + i, threshold);
      const auto own = c.member < 0 ? Pack<uint8_t, V>{} : read_only(&pack_at<V>(mask, i));
      each<V>([&](int j) { mine += above.value[j] && (c.member < 0 || own.value[j] == c.member); });
    });
  });
  keep(c.sums, double(mine), add);
}

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
select_kernel(LETS_PARAMETER BatchOf<launch_of::select_, Capacity> batch, launch_of::select_ c) {
  const Draw draw = draw_of(c.random, c.draws);
  const int64_t threshold = *c.threshold;
  const auto piece = piece_of(batch, int32_t(blockIdx.x));
  const T* v = maybe_at<const T>(piece, 1);
  uint8_t* mask = at<uint8_t>(piece, 0);
  const int64_t position = position_of(piece);
  over<T>(piece, all_aligned(v, mask), [&]<int V>(int i) {
    const auto above = above_at<V>(v, i, draw, position + i, threshold);
    auto own = pack_at<V>(mask, i);
    bool any = false;
    each<V>([&](int j) {
      if (above.value[j] && (c.member < 0 || own.value[j] == c.member)) {
        own.value[j] = uint8_t(c.value);
        any = true;
      }
    });
    if (any) pack_at<V>(mask, i) = own;
  });
}

}  // namespace

void masked_(const launch_of::masked_& c) {
  const bool given = std::any_of(c.runs, c.runs + c.count, [](const Run& run) { return run.address[2] != nullptr; });
  sum_of_chunks(c, [given]<class T, int Capacity>() {
    return given ? &masked_kernel<T, false, Capacity> : &masked_kernel<T, true, Capacity>;
  });
}

void count_above(const launch_of::count_above& c) {
  sum_of_chunks(c, [&]<class T, int Capacity>() { return &count_above_kernel<T, Capacity>; });
}

void select_(const launch_of::select_& c) {
  on_chunks(c, [&]<class T, int Capacity>() { return &select_kernel<T, Capacity>; });
}

}  // namespace lets::cuda
