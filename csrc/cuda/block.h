// How a block walks a chunk: 16 bytes a thread at a time where every address allows, single elements elsewhere.
#pragma once

#include "batch.h"

namespace lets::cuda {

// V elements of storage, moved by one load or store.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};
template <class T>
constexpr int kPack = int(16 / sizeof(T));

// V elements in the arithmetic type.
template <class C, int V>
struct Values {
  C value[V];
};
// f(j) for the elements of a pack.
template <int V, class F>
LETS_DEVICE void each(F f) {
#pragma unroll
  for (int j = 0; j < V; ++j) f(j);
}
template <int V, class T>
LETS_DEVICE Pack<T, V>& pack_at(T* from, int i) {
  return *reinterpret_cast<Pack<T, V>*>(from + i);
}
template <int V, class T>
LETS_DEVICE const Pack<T, V>& pack_at(const T* from, int i) {
  return *reinterpret_cast<const Pack<T, V>*>(from + i);
}
template <class C, int V, class T>
LETS_DEVICE Values<C, V> widened(const Pack<T, V>& pack) {
  Values<C, V> to;
  each<V>([&](int j) { to.value[j] = C(widen(pack.value[j])); });
  return to;
}
template <class C, int V, class T>
LETS_DEVICE Values<C, V> load(const T* from, int i) {
  const Pack<T, V> pack = pack_at<V>(from, i);
  return widened<C>(pack);
}
// The same of memory that the kernel does not write.
template <class C, int V, class T>
LETS_DEVICE Values<C, V> fetch(const T* from, int i) {
  return widened<C>(read_only(&pack_at<V>(from, i)));
}
template <class T, class C, int V>
LETS_DEVICE Pack<T, V> narrowed(const Values<C, V>& values) {
  Pack<T, V> pack;
  each<V>([&](int j) { narrow(values.value[j], pack.value[j]); });
  return pack;
}
template <int V, class T, class C>
LETS_DEVICE void store(T* to, int i, const Values<C, V>& values) {
  pack_at<V>(to, i) = narrowed<T>(values);
}

// Whether all may be moved by the pack; a null address is aligned, so optional lists need no care.
template <class... P>
LETS_DEVICE bool all_aligned(const P*... p) {
  return (((reinterpret_cast<uintptr_t>(p) & 15) == 0) && ...);
}

// Calls f<V>(i) for the elements i, i + 1 … i + V - 1 of a chunk, spread over the block's threads.
template <class T, class Each, class F>
LETS_DEVICE void over(const Piece<Each>& piece, bool by_pack, F f) {
  constexpr int V = kPack<T>;
  const int packed = by_pack ? piece.numel / V * V : 0;
  for (int i = int(threadIdx.x) * V; i < packed; i += kThreads * V) f.template operator()<V>(i);
  for (int i = packed + int(threadIdx.x); i < piece.numel; i += kThreads) f.template operator()<1>(i);
}

// The same for sums: a thread has the same elements, in the same order, whether they can be moved by the pack or not.
// Where nothing is written, the loads of `Ahead` packs are under way before the first of them is added.
template <class T, int Ahead = 1, class Each, class F>
LETS_DEVICE void over_in_order(const Piece<Each>& piece, bool by_pack, F f) {
  constexpr int V = kPack<T>;
  const int packed = piece.numel / V * V;
  if (by_pack) {
#pragma unroll Ahead
    for (int i = int(threadIdx.x) * V; i < packed; i += kThreads * V) f.template operator()<V>(i);
  } else {
#pragma unroll 1
    for (int i = int(threadIdx.x) * V; i < packed; i += kThreads * V) {
#pragma unroll 1
      for (int j = 0; j < V; ++j) f.template operator()<1>(i + j);
    }
  }
  for (int i = packed + int(threadIdx.x); i < piece.numel; i += kThreads) f.template operator()<1>(i);
}

// Calls f(piece) for a block's share of the chunks.
template <class Each, int Capacity, class F>
LETS_DEVICE void over_share(const Batch<Each, Capacity>& batch, int32_t chunks, F f) {
  for (int32_t k = int32_t(blockIdx.x); k < chunks; k += int32_t(gridDim.x)) f(piece_of(batch, k));
}

// T for the elements of one chunk; kernels for runs without any T are compiled with Scaled = false.
template <class C, bool Scaled>
struct Scale {
  int64_t filter_length, filter_count, first;  // first: the filter of the chunk's first element
  uint32_t offset;                             // of that element in its filter, where filters are shorter than a chunk
  int64_t left;                                // elements of that filter from there on
  const C* norms;
  C xi;

  LETS_DEVICE Scale of(const Piece<cuda::Scaled>& piece) {
    if constexpr (!Scaled) return {};
    const cuda::Scaled& run = piece.each;
    Scale s{run.filter_length, run.filter_count, 0, 0, 0, static_cast<const C*>(run.norms), C(run.xi)};
    if (run.filter_length > 0) {
      s.first = piece.begin / run.filter_length;
      s.offset = uint32_t(piece.begin - s.first * run.filter_length);
      s.left = run.filter_length - (piece.begin - s.first * run.filter_length);
      s.first %= run.filter_count;
    }
    return s;
  }
  // Filters at least as long as a chunk change once at most; shorter ones need a division, of 32 bits.
  LETS_DEVICE int64_t filter_of(const Scale& s, int i) {
    int64_t filter = s.first;
    if (s.filter_length >= kPiece) {
      filter += i >= s.left;
    } else {
      filter += (s.offset + uint32_t(i)) / uint32_t(s.filter_length);
    }
    if (filter < s.filter_count) return filter;
    return s.filter_count <= 0x7fffffff ? uint32_t(filter) % uint32_t(s.filter_count) : filter % s.filter_count;
  }
  // The norms of the filters of elements i … i + V - 1.
  template <int V>
  LETS_DEVICE Values<C, V> filters(const Scale& s, int i) {
    Values<C, V> norm;
    const int64_t begin = filter_of(s, i), end = filter_of(s, i + V - 1);
    const C all = s.norms[begin];
    each<V>([&](int j) { norm.value[j] = begin == end ? all : s.norms[filter_of(s, i + j)]; });
    return norm;
  }
  // T of elements i … i + V - 1. `theta` is looked at where T = |theta| + xi, `v` where T is of the Fisher information.
  template <int V>
  LETS_DEVICE Values<C, V> at(const Scale& s, int i, const Values<C, V>& theta, const Values<C, V>& v) {
    Values<C, V> t;
    if (Scaled && s.filter_length == kElementWise) {
      each<V>([&](int j) { t.value[j] = adaptive_scale(absolute(theta.value[j]), s.xi); });
    } else if (Scaled && s.filter_length == kFisher) {
      each<V>([&](int j) { t.value[j] = fisher_scale(v.value[j], s.xi); });
    } else if (!Scaled || s.filter_length == kUnscaled) {
      each<V>([&](int j) { t.value[j] = C(1); });
    } else {
      t = filters<V>(s, i);
      each<V>([&](int j) { t.value[j] = adaptive_scale(t.value[j], s.xi); });
    }
    return t;
  }
};

// ---- sums: in double, each thread's in the order of its elements, the threads' by a tree, the blocks' in slots

struct Sum {
  LETS_DEVICE double join(double a, double b) { return a + b; }
};
// The larger of two, where nothing is larger than NaN.
struct Largest {
  template <class C>
  LETS_DEVICE C join(C a, C b) {
    return b > a || b != b ? b : a;
  }
};

template <class Join>
LETS_DEVICE double block_joined(double mine) {
  LETS_SHARED double part[kThreads];
  part[threadIdx.x] = mine;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (int(threadIdx.x) < width) part[threadIdx.x] = Join::join(part[threadIdx.x], part[threadIdx.x + width]);
    __syncthreads();
  }
  const double total = part[0];
  __syncthreads();  // nobody may write `part` again before everybody has read it
  return total;
}

// Joins the slots that were written, in their order: a block's total goes to its place in front of all slots.
template <class Join>
LETS_KERNEL join_slots(double* sums, int slots) {
  const double* slot = sums + gridDim.x + int64_t(blockIdx.x) * kSlots;
  double mine = 0;
  for (int i = int(threadIdx.x); i < slots; i += kThreads) mine = Join::join(mine, slot[i]);
  const double total = block_joined<Join>(mine);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// Launches `kernel_of<T, Capacity>()` for one sum, or several: the blocks write their own slots, or add to them from
// the second batch on.
template <int Totals = 1, class Join = Sum, class C, class KernelOf>
void sum_of_chunks(const C& c, KernelOf kernel_of) {
  int slots = 0;
  in_batches(c, [&](const auto&, int32_t chunks) { slots = std::max(slots, std::min(chunks, kSlots)); });
  bool add = false;
  with_type(c.dtype, [&]<class T>(T) {
    in_batches(c, [&]<int Capacity>(const BatchOf<C, Capacity>& batch, int32_t chunks) {
      launch(kernel_of.template operator()<T, Capacity>(), slots, kThreads, c.stream, batch, chunks, c, add);
      add = true;
    });
  });
  launch(&join_slots<Join>, Totals, kThreads, c.stream, c.sums, slots);
}

// Writes a block's sum, of number `which` of `Totals`, to its slot.
template <class Join = Sum, int Totals = 1>
LETS_DEVICE void keep(double* sums, double mine, bool add, int which = 0) {
  const double total = block_joined<Join>(mine);
  if (threadIdx.x == 0) {
    double* slot = sums + Totals + int64_t(which) * kSlots + blockIdx.x;
    *slot = add ? Join::join(*slot, total) : total;
  }
}
// The same of elements as they are stored: the sum of their squares.
template <class C, class T, int V>
LETS_DEVICE void add_squares(double& sum, const Pack<T, V>& pack) {
  const auto x = widened<C>(pack);
  each<V>([&](int j) { sum += double(x.value[j]) * double(x.value[j]); });
}

}  // namespace lets::cuda
