// Gradient norm and filter norms. Reads v (and theta where T needs it); writes nothing parameter-sized.
#include "block.h"

namespace lets::cuda {
namespace {

template <class T, bool Scaled, Q Kind, int Capacity>
LETS_KERNEL_FOR(Kind == Q::other ? 3 : 4)
norm_kernel(LETS_PARAMETER BatchOf<launch_of::grad_norm, Capacity> batch, int32_t chunks, launch_of::grad_norm c,
            bool add) {
  using C = Arithmetic<T>;
  double mine = 0;
  auto term = [&](C x) {
    if constexpr (Kind == Q::two) {
      mine += double(x) * double(x);
    } else if constexpr (Kind == Q::one) {
      mine += absolute(double(x));
    } else {
      mine += power(absolute(double(x)), c.q);
    }
  };
  over_share(batch, chunks, [&](const auto& piece) {
    const T* v = at<const T>(piece, 0);
    const T* theta = Scaled && piece.each.filter_length == kElementWise ? at<const T>(piece, 1) : nullptr;
    const auto scale = Scale<C, Scaled>::of(piece);
    over_in_order<T, Scaled || Kind == Q::other ? 1 : 4>(piece, all_aligned(v, theta), [&]<int V>(int i) {
      const auto x = fetch<C, V>(v, i);
      const auto t = Scale<C, Scaled>::at(scale, i, theta ? fetch<C, V>(theta, i) : x, x);
      each<V>([&](int j) { term(t.value[j] * x.value[j]); });
    });
  });
  keep(c.sums, mine, add);
}

// Filters of many elements get a block each, small ones a warp.
constexpr int kWarp = 32, kWarps = kThreads / kWarp;
constexpr int64_t kLongFilter = 2048;

int64_t filter_chunks(int64_t numel, const Scaled& run) {
  if (run.filter_length < 1) return 0;
  return numel / run.filter_count >= kLongFilter ? run.filter_count : (run.filter_count + kWarps - 1) / kWarps;
}

template <class T, int Capacity>
LETS_KERNEL filter_kernel(LETS_PARAMETER BatchOf<launch_of::filter_norms, Capacity> batch) {
  using C = Arithmetic<T>;
  LETS_SHARED double part[kThreads];
  const int32_t index = run_of(batch, int32_t(blockIdx.x));
  const Scaled& run = batch.each[index];
  const int64_t numel = batch.run[index].numel;
  const int64_t chunk = int32_t(blockIdx.x) - batch.first[index];
  const bool by_block = numel / run.filter_count >= kLongFilter;
  const int group = by_block ? kThreads : kWarp;  // threads that share a filter
  const int64_t filter = by_block ? chunk : chunk * kWarps + int(threadIdx.x) / kWarp;
  const int lane = int(threadIdx.x) % group;
  double mine = 0;
  if (filter < run.filter_count) {
    const T* theta = reinterpret_cast<const T*>(batch.run[index].address[0]);
    const int64_t stride = run.filter_length * run.filter_count;
    auto add = [&](const auto& x) {
      for (auto value : x.value) mine += double(value) * double(value);
    };
    // By packs of 16 bytes if all filters begin at a multiple of that, such as those of 3 x 3 x 64 elements; otherwise
    // element by element, in the same order.
    constexpr int V = kPack<T>;
    const int64_t packed = run.filter_length / V * V;
    const bool by_pack = all_aligned(theta) && run.filter_length % V == 0;
    for (int64_t outer = filter * run.filter_length; outer < numel; outer += stride) {
      const T* from = theta + outer;
#pragma unroll 2
      for (int64_t i = int64_t(lane) * V; i < packed; i += int64_t(group) * V) {
        if (by_pack) {
          add(fetch<C, V>(from + i, 0));
        } else {
          for (int j = 0; j < V; ++j) add(fetch<C, 1>(from + i, j));
        }
      }
      for (int64_t i = packed + lane; i < run.filter_length; i += group) add(fetch<C, 1>(from + i, 0));
    }
  }
  part[threadIdx.x] = mine;
  __syncthreads();
  for (int width = group / 2; width > 0; width /= 2) {
    if (lane < width) part[threadIdx.x] += part[threadIdx.x + width];
    __syncthreads();
  }
  if (lane == 0 && filter < run.filter_count)
    static_cast<C*>(const_cast<void*>(run.norms))[filter] = C(square_root(part[threadIdx.x]));
}

}  // namespace

void grad_norm(const launch_of::grad_norm& c) {
  with_cases(c, [&]<bool Scaled, Q Kind>() {
    sum_of_chunks(c, [&]<class T, int Capacity>() { return &norm_kernel<T, Scaled, Kind, Capacity>; });
  });
}

void filter_norms(const launch_of::filter_norms& c) {
  with_type(c.dtype, [&]<class T>(T) {
    const auto chunks_of = [&](int64_t i) { return filter_chunks(c.runs[i].numel, c.each[i]); };
    using Op = launch_of::filter_norms;
    in_batches(c.runs, c.each, c.count, chunks_of,
               [&]<int Capacity>(const BatchOf<Op, Capacity>& batch, int32_t chunks) {
                 launch(&filter_kernel<T, Capacity>, chunks, kThreads, c.stream, batch);
               });
  });
}

}  // namespace lets::cuda
