// Masks. masked: reads v and the mask, where it is given; writes out. count: reads v, where given, and the mask.
// select: the same, and writes the mask.
#include "draw.h"

namespace lets::cuda {
namespace {

template <class T, bool Drawn, int Capacity>
LETS_KERNEL_FOR(4)
masked_kernel(LETS_PARAMETER Batch<Capacity> batch, int32_t chunks, const int64_t* random, uint32_t draws, double share,
              double* sums, bool add) {
  using C = typename ArithmeticOf<T>::type;
  const Draw draw = draw_of(random, draws);
  const uint64_t limit = word_limit(share);
  const C enlarge = C(1 / share);
  double mine = 0;
  for (int32_t c = int32_t(blockIdx.x); c < chunks; c += int32_t(gridDim.x)) {
    const Piece piece = piece_of(batch, c);
    const Row& row = batch.row[piece.row];
    T* out = reinterpret_cast<T*>(row.address[0]) + piece.begin;
    const T* v = reinterpret_cast<const T*>(row.address[1]) + piece.begin;
    const uint8_t* mask = Drawn ? nullptr : reinterpret_cast<const uint8_t*>(row.address[2]) + piece.begin;
    const int64_t position = position_of(row, piece);
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
  keep(sums, mine, add);
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
count_above_kernel(LETS_PARAMETER Batch<Capacity> batch, int32_t chunks, const int64_t* limit, const int64_t* random,
                   uint32_t draws, int64_t member, double* sums, bool add) {
  const Draw draw = draw_of(random, draws);
  const int64_t threshold = *limit;
  int64_t mine = 0;
  for (int32_t c = int32_t(blockIdx.x); c < chunks; c += int32_t(gridDim.x)) {
    const Piece piece = piece_of(batch, c);
    const Row& row = batch.row[piece.row];
    const T* v = row.address[0] ? reinterpret_cast<const T*>(row.address[0]) + piece.begin : nullptr;
    const uint8_t* mask = reinterpret_cast<const uint8_t*>(row.address[1]) + piece.begin;
    const int64_t position = position_of(row, piece);
    over_in_order<T>(piece.numel, aligned(v) && aligned(mask), [&](auto width, int i) {
      constexpr int V = decltype(width)::value;
      const auto above = above_at<V>(v, i, draw, position + i, threshold);
      const auto own = member < 0 ? Pack<uint8_t, V>{} : read_only(&pack_at<V>(mask, i));
#pragma unroll
      for (int j = 0; j < V; ++j) mine += above.value[j] && (member < 0 || own.value[j] == member);
    });
  }
  keep(sums, double(mine), add);
}

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
select_kernel(LETS_PARAMETER Batch<Capacity> batch, const int64_t* limit, const int64_t* random, uint32_t draws,
              int64_t member, uint8_t value) {
  const Draw draw = draw_of(random, draws);
  const int64_t threshold = *limit;
  const Piece piece = piece_of(batch, int32_t(blockIdx.x));
  const Row& row = batch.row[piece.row];
  const T* v = row.address[0] ? reinterpret_cast<const T*>(row.address[0]) + piece.begin : nullptr;
  uint8_t* mask = reinterpret_cast<uint8_t*>(row.address[1]) + piece.begin;
  const int64_t position = position_of(row, piece);
  over<T>(piece.numel, aligned(v) && aligned(mask), [&](auto width, int i) {
    constexpr int V = decltype(width)::value;
    const auto above = above_at<V>(v, i, draw, position + i, threshold);
    auto own = pack_at<V>(mask, i);
    bool any = false;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (above.value[j] && (member < 0 || own.value[j] == member)) {
        own.value[j] = value;
        any = true;
      }
    }
    if (any) pack_at<V>(mask, i) = own;
  });
}

}  // namespace

void masked(Dtype dtype, const Row* rows, int64_t count, const int64_t* random, uint32_t draws, double share,
            double* sums, void* stream) {
  const bool given = std::any_of(rows, rows + count, [](const Row& row) { return row.address[2] != nullptr; });
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    sum_in_batches(rows, count, sums, stream, [&](const auto& batch, int32_t chunks, int blocks, bool add) {
      constexpr int capacity = capacity_of<decltype(batch)>;
      launch(given ? &masked_kernel<T, false, capacity> : &masked_kernel<T, true, capacity>, blocks, kThreads, stream,
             batch, chunks, random, draws, share, sums, add);
    });
  });
}

void count_above(Dtype dtype, const Row* rows, int64_t count, const int64_t* threshold, const int64_t* random,
                 uint32_t draws, int64_t member, double* sums, void* stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    sum_in_batches(rows, count, sums, stream, [&](const auto& batch, int32_t chunks, int blocks, bool add) {
      launch(&count_above_kernel<T, capacity_of<decltype(batch)>>, blocks, kThreads, stream, batch, chunks, threshold,
             random, draws, member, sums, add);
    });
  });
}

void select_above(Dtype dtype, const Row* rows, int64_t count, const int64_t* threshold, const int64_t* random,
                  uint32_t draws, int64_t member, uint8_t value, void* stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    in_batches(rows, count, pieces, [&](const auto& batch, int32_t chunks) {
      launch(&select_kernel<T, capacity_of<decltype(batch)>>, chunks, kThreads, stream, batch, threshold, random, draws,
             member, value);
    });
  });
}

}  // namespace lets::cuda
