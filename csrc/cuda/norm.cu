// Gradient norm and filter norms. Reads v (and theta where T needs it); writes nothing parameter-sized.
#include "block.h"

namespace lets::cuda {
namespace {

template <class T, Q Kind, bool Scaled, int Capacity>
LETS_KERNEL_FOR(Kind == Q::other ? 3 : 4)
norm_kernel(LETS_PARAMETER Batch<Capacity> batch, int32_t chunks, launch_of::grad_norm c, bool add) {
  using C = typename ArithmeticOf<T>::type;
  double mine = 0;
  for (int32_t k = int32_t(blockIdx.x); k < chunks; k += int32_t(gridDim.x)) {
    const Piece piece = piece_of(batch, k);
    const Run& run = batch.run[piece.run];
    const T* v = reinterpret_cast<const T*>(run.address[0]) + piece.begin;
    const T* theta =
        Scaled && run.row_length == kElementWise ? reinterpret_cast<const T*>(run.address[1]) + piece.begin : nullptr;
    auto term = [&](C x) {
      if constexpr (Kind == Q::two) {
        mine += double(x) * double(x);
      } else if constexpr (Kind == Q::one) {
        mine += absolute(double(x));
      } else {
        mine += power(absolute(double(x)), c.q);
      }
    };
    const auto scale = Scale<C, Scaled>::of(run, piece.begin, c.xi);
    over_in_order<T>(piece.numel, aligned(v) && aligned(theta), [&](auto width, int i) {
      constexpr int V = decltype(width)::value;
      const auto x = fetch<C, V>(v, i);
      const auto t = Scale<C, Scaled>::at(scale, i, theta ? fetch<C, V>(theta, i) : x, x);
#pragma unroll
      for (int j = 0; j < V; ++j) term(t.value[j] * x.value[j]);
    });
  }
  keep(c.sums, mine, add);
}

// Filters of many elements get a block each, small ones a warp.
constexpr int kWarp = 32, kWarps = kThreads / kWarp;
constexpr int64_t kLongFilter = 2048;

inline bool is_long(const Run& run) { return run.numel / run.row_count >= kLongFilter; }
int64_t filter_chunks(const Run& run) {
  if (run.row_length < 1) return 0;
  return is_long(run) ? run.row_count : (run.row_count + kWarps - 1) / kWarps;
}

template <class T, int Capacity>
LETS_KERNEL filter_kernel(LETS_PARAMETER Batch<Capacity> batch) {
  using C = typename ArithmeticOf<T>::type;
  LETS_SHARED double part[kThreads];
  const int32_t index = run_of(batch, int32_t(blockIdx.x));
  const Run& run = batch.run[index];
  const int64_t chunk = int32_t(blockIdx.x) - batch.first[index];
  const bool by_block = run.numel / run.row_count >= kLongFilter;
  const int group = by_block ? kThreads : kWarp;  // threads that share a filter
  const int64_t filter = by_block ? chunk : chunk * kWarps + int(threadIdx.x) / kWarp;
  const int lane = int(threadIdx.x) % group;
  double mine = 0;
  if (filter < run.row_count) {
    const T* theta = reinterpret_cast<const T*>(run.address[0]);
    const int64_t stride = run.row_length * run.row_count;
    auto add = [&](const auto& x) {
      for (auto value : x.value) mine += double(value) * double(value);
    };
    // By the pack, and in the same order without: filters of 3 x 3 x 64 elements begin at a multiple of 16 bytes.
    constexpr int V = kPack<T>;
    const int64_t packed = run.row_length / V * V;
    const bool by_pack = aligned(theta) && run.row_length % V == 0;
    for (int64_t outer = filter * run.row_length; outer < run.numel; outer += stride) {
      const T* from = theta + outer;
#pragma unroll 2
      for (int64_t i = int64_t(lane) * V; i < packed; i += int64_t(group) * V) {
        if (by_pack) {
          add(fetch<C, V>(from + i, 0));
        } else {
          for (int j = 0; j < V; ++j) add(fetch<C, 1>(from + i, j));
        }
      }
      for (int64_t i = packed + lane; i < run.row_length; i += group) add(fetch<C, 1>(from + i, 0));
    }
  }
  part[threadIdx.x] = mine;
  __syncthreads();
  for (int width = group / 2; width > 0; width /= 2) {
    if (lane < width) part[threadIdx.x] += part[threadIdx.x + width];
    __syncthreads();
  }
  if (lane == 0 && filter < run.row_count)
    static_cast<C*>(const_cast<void*>(run.norms))[filter] = C(square_root(part[threadIdx.x]));
}

}  // namespace

void grad_norm(const launch_of::grad_norm& c) {
  with_type(c.dtype, [&](auto type) {
    with_exponent(c.q, [&](auto kind) {
      with_scaling(c.runs, c.count, [&](auto scaled) {
        using T = decltype(type);
        sum_in_batches(c.runs, c.count, c.sums, c.stream, [&](const auto& batch, int32_t chunks, int blocks, bool add) {
          launch(&norm_kernel<T, decltype(kind)::value, decltype(scaled)::value, capacity_of<decltype(batch)>>, blocks,
                 kThreads, c.stream, batch, chunks, c, add);
        });
      });
    });
  });
}

void filter_norms(const launch_of::filter_norms& c) {
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    in_batches(c.runs, c.count, filter_chunks, [&](const auto& batch, int32_t chunks) {
      launch(&filter_kernel<T, capacity_of<decltype(batch)>>, chunks, kThreads, c.stream, batch);
    });
  });
}

}  // namespace lets::cuda
