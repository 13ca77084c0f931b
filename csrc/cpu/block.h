// How every CPU kernel walks a chunk: block by block through the first-level cache, in the arithmetic type.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../math.h"
#include "kernels.h"

namespace lets::cpu::LETS_ISA {
namespace {

constexpr int64_t kBlock = 1024;
constexpr int kLanes = 32;

LETS_FN int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Where two, or three, vectors are read and nothing is written, smaller blocks: requests for a page of each at once
// would wait for each other. They are made this far ahead.
constexpr int64_t kBlockOfTwo = 256;
constexpr int64_t kBlockOfThree = 64;
constexpr int64_t kReadAhead = 1024;

// Ask for what comes after this block: the processor's own prefetchers stop at the end of a page.
LETS_FN void prefetch(const void* next, int64_t bytes) {
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(next) + i);
}

// Write past the caches; saves the read that an ordinary store of a cold line costs.
LETS_FN void copy_nontemporal(void* to, const void* from, int64_t bytes) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
  using Line = __m512i;
#elif defined(__AVX2__)
  using Line = __m256i;
#else
  using Line = __m128i;
#endif
  constexpr int64_t kLine = sizeof(Line);
  auto* d = static_cast<char*>(to);
  auto* s = static_cast<const char*>(from);
  const int64_t head = smaller(int64_t(-reinterpret_cast<uintptr_t>(d) & (kLine - 1)), bytes);
  __builtin_memcpy(d, s, size_t(head));
  int64_t i = head;
  for (; i + kLine <= bytes; i += kLine) {
    Line line;
    __builtin_memcpy(&line, s + i, sizeof(line));
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<Line*>(d + i), line);
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<Line*>(d + i), line);
#else
    _mm_stream_si128(reinterpret_cast<Line*>(d + i), line);
#endif
  }
  __builtin_memcpy(d + i, s + i, size_t(bytes - i));
#else
  __builtin_memcpy(to, from, size_t(bytes));
#endif
}

LETS_FN void copy(void* to, const void* from, int64_t bytes, bool nontemporal) {
  if (nontemporal) {
    copy_nontemporal(to, from, bytes);
  } else {
    __builtin_memcpy(to, from, size_t(bytes));
  }
}

// Non-temporal stores become visible to other threads only after this.
LETS_FN void finish(bool nontemporal) {
#if defined(__SSE2__)
  if (nontemporal) _mm_sfence();
#else
  (void)nontemporal;
#endif
}

// Every buffer begins at the start of a page. A load waits for an earlier store whose address has the same last 12
// bits: buffers with other offsets would make element i of one wait for element i + 1 of another.
constexpr int64_t kPage = 4096;

// A list of the chunk that is read, with room for a block.
template <class T, int64_t Block = kBlock>
struct Input {
  explicit Input(const void* list) : list(static_cast<const T*>(list)) {}
  alignas(kPage) Arithmetic<T> buffer[Block];
  const T* const list;
};

// One that is written, and may be read before.
template <class T>
struct Output {
  explicit Output(void* list, bool nontemporal = false) : list(static_cast<T*>(list)), nontemporal(nontemporal) {}
  alignas(kPage) Arithmetic<T> buffer[kBlock];
  alignas(kPage) T narrowed[kBlock];
  T* const list;
  const bool nontemporal;
};

// A block of a list as arithmetic values: the memory itself where the types agree, else converted.
template <class List>
LETS_FN const auto* load(List& list, int64_t begin, int64_t n, int64_t ahead) {
  const auto* from = list.list + begin;
  prefetch(from + ahead, n * int64_t(sizeof(*from)));
  if constexpr (sizeof(*from) == sizeof(*list.buffer)) {
    return from;
  } else {
    for (int64_t i = 0; i < n; ++i) list.buffer[i] = widen(from[i]);
    return &list.buffer[0];
  }
}
template <class List>
LETS_FN const auto* load(List& list, int64_t begin, int64_t n) {
  return load(list, begin, n, n);
}

// Where a block's results are computed: the memory itself if it may be.
template <class T>
LETS_FN Arithmetic<T>* result(Output<T>& to, int64_t begin) {
  if constexpr (sizeof(T) == sizeof(Arithmetic<T>))
    if (!to.nontemporal) return to.list + begin;
  return to.buffer;
}

// How they get to storage.
template <class T>
LETS_FN void store(Output<T>& to, const Arithmetic<T>* from, int64_t begin, int64_t n) {
  if constexpr (sizeof(T) == sizeof(Arithmetic<T>)) {
    if (to.nontemporal) copy_nontemporal(to.list + begin, from, n * int64_t(sizeof(T)));
  } else {
    T* target = to.nontemporal ? to.narrowed : to.list + begin;
    for (int64_t i = 0; i < n; ++i) narrow(from[i], target[i]);
    if (to.nontemporal) copy_nontemporal(to.list + begin, target, n * int64_t(sizeof(T)));
  }
}

// Stores results as `store` does, and returns them, rounded to the stored type. Without a list nothing is stored.
template <class T>
LETS_FN const Arithmetic<T>* keep(Output<T>& to, Arithmetic<T>* values, int64_t begin, int64_t n) {
  if constexpr (sizeof(T) == sizeof(Arithmetic<T>)) {
    if (to.list && to.nontemporal) copy_nontemporal(to.list + begin, values, n * int64_t(sizeof(T)));
  } else {
    for (int64_t i = 0; i < n; ++i) narrow(values[i], to.narrowed[i]);
    for (int64_t i = 0; i < n; ++i) values[i] = widen(to.narrowed[i]);
    if (to.list) copy(to.list + begin, to.narrowed, n * int64_t(sizeof(T)), to.nontemporal);
  }
  return values;
}

// The norm of each element's filter, plus `xi`.
template <class C>
LETS_FN void filter_scales(const Scaling& s, int64_t begin, C xi, C* buffer, int64_t n) {
  const auto* norms = static_cast<const C*>(s.norms);
  const int64_t element = s.offset + begin;
  int64_t filter = (element / s.filter_length) % s.filter_count, left = s.filter_length - element % s.filter_length;
  for (int64_t i = 0; i < n;) {
    const int64_t end = smaller(n, i + left);
    const C t = adaptive_scale(norms[filter], xi);
    for (; i < end; ++i) buffer[i] = t;
    left = s.filter_length;
    filter = filter + 1 == s.filter_count ? 0 : filter + 1;
  }
}

// T of a block, or null where T = 1. `theta` may be null unless the scaling is element-wise.
template <class C>
LETS_FN const C* scales(const Scaling& s, const C* theta, const C* v, int64_t begin, C* buffer, int64_t n) {
  if (s.filter_length == kUnscaled) return nullptr;
  const C xi = C(s.xi);
  if (s.filter_length == kFisher) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = fisher_scale(v[i], xi);
    return buffer;
  }
  if (s.filter_length == kElementWise) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = adaptive_scale(absolute(theta[i]), xi);
    return buffer;
  }
  filter_scales(s, begin, xi, buffer, n);
  return buffer;
}

// The same where the weights are not at hand.
template <class C, class T>
LETS_FN const C* scales(const Scaling& s, Input<T>& theta, const C* v, int64_t begin, C* buffer, int64_t n) {
  return scales(s, s.filter_length == kElementWise ? load(theta, begin, n) : nullptr, v, begin, buffer, n);
}

// Sums in double, in lanes that are the same on every instruction set.
struct Sum {
  double lane[kLanes] = {};

  template <class Term>
  LETS_FN void add(Sum& sum, int64_t n, Term term) {
    double lane[kLanes];
    for (int l = 0; l < kLanes; ++l) lane[l] = sum.lane[l];
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int l = 0; l < kLanes; ++l) lane[l] += term(i + l);
    for (int l = 0; i + l < n; ++l) lane[l] += term(i + l);
    for (int l = 0; l < kLanes; ++l) sum.lane[l] = lane[l];
  }
  template <class C>
  LETS_FN void add_squares(Sum& sum, int64_t n, const C* x) {
    add(sum, n, [=](int64_t i) { return double(x[i]) * double(x[i]); });
  }
  LETS_FN double total(const Sum& sum) {
    double lane[kLanes];
    for (int l = 0; l < kLanes; ++l) lane[l] = sum.lane[l];
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
    return lane[0];
  }
};

}  // namespace

// An op of kernels.h, by its walk<T> over a chunk of the storage type T.
#define LETS_OP(op)                                                                \
  auto op(const chunk_of::op& c) -> decltype(walk<float>(c)) {                     \
    return with_type(c.dtype, [&](auto type) { return walk<decltype(type)>(c); }); \
  }

}  // namespace lets::cpu::LETS_ISA
