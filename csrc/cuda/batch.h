// How a launch learns of its runs, and how a block finds its chunk.
//
// The runs travel by value, as a kernel parameter: nothing is allocated or copied for them, nothing has to outlive the
// launch, and a CUDA graph keeps its own copy. What does not fit goes into further launches.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../math.h"
#include "kernels.h"
#include "launch.h"

namespace lets::cuda {

constexpr int kThreads = 256;
constexpr int64_t kPiece = 8192;  // elements of a chunk; a multiple of what a block takes at once
static_assert(kPiece % (kThreads * 8) == 0, "whole packs for every thread");

// `Each` is what the op's kernel gets of every run beside its addresses (declared.h).
template <class Each, int Capacity>
struct Batch {
  static constexpr bool differs = !std::is_empty_v<Each>;
  Run run[Capacity];
  Each each[differs ? Capacity : 1];
  int32_t first[Capacity + 1];  // the first chunk of every run, and the number of chunks behind the last
  int32_t runs;
};
// That of an op, by its launch.
template <class Op, int Capacity>
using BatchOf = Batch<typename Op::Each, Capacity>;

// Few runs make a short parameter, which every launch has to carry. The most it may be are 32,764 bytes, of which the
// other arguments get 256.
constexpr int kFew = 8, kParameter = 32764 - 256;
template <class Each>
constexpr int kMany = int((kParameter - sizeof(Batch<Each, 1>)) /
                          (sizeof(Run) + (std::is_empty_v<Each> ? 0 : sizeof(Each)) + sizeof(int32_t)));

// A stretch of one run.
template <class Each>
struct Piece {
  const Run& run;
  const Each& each;
  int64_t begin;
  int32_t numel;
};

// The run that chunk `index` belongs to.
template <class Each, int Capacity>
LETS_DEVICE int32_t run_of(const Batch<Each, Capacity>& batch, int32_t index) {
  int32_t low = 0, high = batch.runs - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (batch.first[middle] <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <class Each, int Capacity>
LETS_DEVICE Piece<Each> piece_of(const Batch<Each, Capacity>& batch, int32_t index) {
  const int32_t run = run_of(batch, index);
  const int64_t begin = int64_t(index - batch.first[run]) * kPiece;
  const int64_t left = batch.run[run].numel - begin;
  return {batch.run[run], batch.each[batch.differs ? run : 0], begin, int32_t(left < kPiece ? left : kPiece)};
}

// The chunk's first element in one of the op's lists.
template <class T, class Each>
LETS_DEVICE T* at(const Piece<Each>& piece, int list) {
  return reinterpret_cast<T*>(piece.run.address[list]) + piece.begin;
}
// The same where the op may have been called without the list; null then.
template <class T, class Each>
LETS_DEVICE T* maybe_at(const Piece<Each>& piece, int list) {
  return piece.run.address[list] ? at<T>(piece, list) : nullptr;
}

// Cuts runs into launches: f(batch, chunks) with a batch of kFew or of kMany runs. `chunks_of(i)` is the work of run i.
template <class Each, class ChunksOf, class F>
void in_batches(const Run* runs, const Each* each, int64_t count, ChunksOf chunks_of, F f) {
  int64_t next = 0;
  auto fill = [&]<int Capacity>() {
    Batch<Each, Capacity> batch;
    static_assert(sizeof(batch) <= kParameter, "the batch and the other arguments must fit a launch");
    int64_t chunks = 0;
    batch.runs = 0;
    for (; next < count && batch.runs < Capacity; ++next) {
      const int64_t more = chunks_of(next);
      if (more == 0) continue;
      if (more > kChunksALaunch) throw std::runtime_error("lets_kernels: a run of more than 2^43 elements");
      if (chunks + more > kChunksALaunch) break;
      batch.run[batch.runs] = runs[next];
      if constexpr (batch.differs) batch.each[batch.runs] = each[next];
      batch.first[batch.runs++] = int32_t(chunks);
      chunks += more;
    }
    batch.first[batch.runs] = int32_t(chunks);
    if (chunks > 0) f(batch, int32_t(chunks));
  };
  while (next < count)
    count - next <= kFew ? fill.template operator()<kFew>() : fill.template operator()<kMany<Each>>();
}

inline int64_t pieces(const Run& run) { return (run.numel + kPiece - 1) / kPiece; }
// The same for the runs of a call.
template <class C, class F>
void in_batches(const C& c, F f) {
  in_batches(c.runs, c.each, c.count, [&](int64_t i) { return pieces(c.runs[i]); }, f);
}

// Launches `kernel_of<T, Capacity>()`, with a block for each of the chunks, for the storage type of a call.
template <class C, class KernelOf>
void on_chunks(const C& c, KernelOf kernel_of) {
  with_type(c.dtype, [&]<class T>(T) {
    in_batches(c, [&]<int Capacity>(const BatchOf<C, Capacity>& batch, int32_t chunks) {
      launch(kernel_of.template operator()<T, Capacity>(), chunks, kThreads, c.stream, batch, c);
    });
  });
}

// Calls f<whether any run has a T, the exponent>(): cases known when compiled, so that the common ones cost no power.
enum class Q : int { one, two, other };
template <class C, class F>
void with_cases(const C& c, F f) {
  auto with_exponent = [&]<bool Scaled>() {
    if (c.q == 2) return f.template operator()<Scaled, Q::two>();
    if (c.q == 1) return f.template operator()<Scaled, Q::one>();
    return f.template operator()<Scaled, Q::other>();
  };
  const bool scaled =
      std::any_of(c.each, c.each + c.count, [](const Scaled& run) { return run.filter_length != kUnscaled; });
  return scaled ? with_exponent.template operator()<true>() : with_exponent.template operator()<false>();
}

// dual() of math.h for an exponent known when compiled.
template <Q Kind, class C>
LETS_DEVICE C dual_of(C x, C q) {
  if constexpr (Kind == Q::two) return x;
  if constexpr (Kind == Q::one) return dual(x, C(1));
  return dual(x, q);
}

}  // namespace lets::cuda
