// Masks. masked: reads v and the mask, where it is given; writes out. count: reads v, where given, and the mask.
// select: the same, and writes the mask.
#include "draw.h"

namespace lets::cuda {
namespace {

template <class T, bool Drawn, int Capacity>
LETS_KERNEL_FOR(4)
masked_kernel(LETS_PARAMETER Batch<Capacity> batch, int32_t chunks, launch_of::masked_ c, bool add) {
  using C = typename ArithmeticOf<T>::type;
  const Draw draw = draw_of(c.random, c.draws);
  const uint64_t limit = word_limit(c.share);
  const C enlarge = C(1 / c.share);
  double mine = 0;
  for (int32_t k = int32_t(blockIdx.x); k < chunks; k += int32_t(gridDim.x)) {
    const Piece piece = piece_of(batch, k);
    const Run& run = batch.run[piece.run];
    T* out = reinterpret_cast<T*>(run.address[0]) + piece.begin;
    const T* v = reinterpret_cast<const T*>(run.address[1]) + piece.begin;
    const uint8_t* mask = Drawn ? nullptr : reinterpret_cast<const uint8_t*>(run.address[2]) + piece.begin;
    const int64_t position = position_of(run, piece);
    over_in_order<T>(piece.numel, aligned(out) && aligned(v) && aligned(mask), [&](auto width, int i) {
      constexpr int V = decltype(width)::value;
      const Pack<T, V> whole = read_only(&pack_at<V>(v, i));
      add_squares<C>(mine, whole);
      Pack<T, V> kept;
      if constexpr (Drawn) {
        const auto words = words_at<V>(draw, position + i);
        auto x = widened<C>(whole);
#pragma unroll
        for (int j = 0; j < V; ++j) x.value[j] = words.value[j] < limit ? x.value[j] * enlarge : C(0);
        kept = narrowed<T>(x);
      } else {
        const auto own = read_only(&pack_at<V>(mask, i));
#pragma unroll
        for (int j = 0; j < V; ++j) kept.value[j] = own.value[j] ? whole.value[j] : T{};
      }
      pack_at<V>(out, i) = kept;
    });
  }
  keep(c.sums, mine, add);
}

// Whether the elements i … i + V - 1 have keys above the threshold. Words are drawn only where they can decide.
template <int V, class T>
LETS_DEVICE Values<bool, V> above_at(const T* v, int i, const Draw& draw, int64_t position, int64_t threshold) {
  Values<bool, V> above;
  if (!v) {
    const auto words = words_at<V>(draw, position);
#pragma unroll
    for (int j = 0; j < V; ++j) above.value[j] = key_of(words.value[j]) > threshold;
    return above;
  }
  const auto x = fetch<float, V>(v, i);
  bool decided = true;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    above.value[j] = key_of(x.value[j], 0) > threshold;
    decided = decided && above.value[j] == (key_of(x.value[j], 0xffffffffu) > threshold);
  }
  if (decided) return above;
  const auto words = words_at<V>(draw, position);
#pragma unroll
  for (int j = 0; j < V; ++j) above.value[j] = key_of(x.value[j], words.value[j]) > threshold;
  return above;
}

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
count_above_kernel(LETS_PARAMETER Batch<Capacity> batch, int32_t chunks, launch_of::count_above c, bool add) {
  const Draw draw = draw_of(c.random, c.draws);
  const int64_t threshold = *c.threshold;
  int64_t mine = 0;
  for (int32_t k = int32_t(blockIdx.x); k < chunks; k += int32_t(gridDim.x)) {
    const Piece piece = piece_of(batch, k);
    const Run& run = batch.run[piece.run];
    const T* v = run.address[0] ? reinterpret_cast<const T*>(run.address[0]) + piece.begin : nullptr;
    const uint8_t* mask = reinterpret_cast<const uint8_t*>(run.address[1]) + piece.begin;
    const int64_t position = position_of(run, piece);
    over_in_order<T>(piece.numel, aligned(v) && aligned(mask), [&](auto width, int i) {
      constexpr int V = decltype(width)::value;
      const auto above = above_at<V>(v, i, draw, position + i, threshold);
      const auto own = c.member < 0 ? Pack<uint8_t, V>{} : read_only(&pack_at<V>(mask, i));
#pragma unroll
      for (int j = 0; j < V; ++j) mine += above.value[j] && (c.member < 0 || own.value[j] == c.member);
    });
  }
  keep(c.sums, double(mine), add);
}

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
select_kernel(LETS_PARAMETER Batch<Capacity> batch, launch_of::select_ c) {
  const Draw draw = draw_of(c.random, c.draws);
  const int64_t threshold = *c.threshold;
  const Piece piece = piece_of(batch, int32_t(blockIdx.x));
  const Run& run = batch.run[piece.run];
  const T* v = run.address[1] ? reinterpret_cast<const T*>(run.address[1]) + piece.begin : nullptr;
  uint8_t* mask = reinterpret_cast<uint8_t*>(run.address[0]) + piece.begin;
  const int64_t position = position_of(run, piece);
  over<T>(piece.numel, aligned(v) && aligned(mask), [&](auto width, int i) {
    constexpr int V = decltype(width)::value;
    const auto above = above_at<V>(v, i, draw, position + i, threshold);
    auto own = pack_at<V>(mask, i);
    bool any = false;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (above.value[j] && (c.member < 0 || own.value[j] == c.member)) {
        own.value[j] = uint8_t(c.value);
        any = true;
      }
    }
    if (any) pack_at<V>(mask, i) = own;
  });
}

}  // namespace

void masked_(const launch_of::masked_& c) {
  const bool given = std::any_of(c.runs, c.runs + c.count, [](const Run& run) { return run.address[2] != nullptr; });
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    sum_in_batches(c.runs, c.count, c.sums, c.stream, [&](const auto& batch, int32_t chunks, int blocks, bool add) {
      constexpr int capacity = capacity_of<decltype(batch)>;
      launch(given ? &masked_kernel<T, false, capacity> : &masked_kernel<T, true, capacity>, blocks, kThreads, c.stream,
             batch, chunks, c, add);
    });
  });
}

void count_above(const launch_of::count_above& c) {
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    sum_in_batches(c.runs, c.count, c.sums, c.stream, [&](const auto& batch, int32_t chunks, int blocks, bool add) {
      launch(&count_above_kernel<T, capacity_of<decltype(batch)>>, blocks, kThreads, c.stream, batch, chunks, c, add);
    });
  });
}

void select_(const launch_of::select_& c) {
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    in_batches(c.runs, c.count, pieces, [&](const auto& batch, int32_t chunks) {
      launch(&select_kernel<T, capacity_of<decltype(batch)>>, chunks, kThreads, c.stream, batch, c);
    });
  });
}

}  // namespace lets::cuda
