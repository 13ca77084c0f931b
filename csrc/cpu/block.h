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

// A line of the caches, which non-temporal stores fill at a time.
constexpr int64_t kLine = 64;

// Ask for what comes after this block: the processor's own prefetchers stop at the end of a page.
LETS_FN void prefetch(const void* next, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(next) + i);
}

// Write a line past the caches, which saves the read that ordinary stores to a cold line cost. `to` begins a line.
LETS_FN void write_line(void* to, const void* from) {
#if defined(__AVX512F__)
  using Part = __m512i;
#elif defined(__AVX2__)
  using Part = __m256i;
#elif defined(__SSE2__)
  using Part = __m128i;
#endif
#if defined(__SSE2__)
  auto* d = static_cast<char*>(to);
  auto* s = static_cast<const char*>(from);
  for (int64_t i = 0; i < kLine; i += int64_t(sizeof(Part))) {
    Part part;
    __builtin_memcpy(&part, s + i, sizeof(part));
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<Part*>(d + i), part);
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<Part*>(d + i), part);
#else
    _mm_stream_si128(reinterpret_cast<Part*>(d + i), part);
#endif
  }
#else
  __builtin_memcpy(to, from, size_t(kLine));
#endif
}

// The bytes before the first line that begins in the `bytes` from `to` on; all of them if none does.
LETS_FN int64_t before_line(const void* to, int64_t bytes) {
  return smaller(int64_t(-reinterpret_cast<uintptr_t>(to) & (kLine - 1)), bytes);
}

// A copy past the caches.
LETS_FN void copy_nontemporal(void* to, const void* from, int64_t bytes) {
  auto* d = static_cast<char*>(to);
  auto* s = static_cast<const char*>(from);
  int64_t i = before_line(d, bytes);
  __builtin_memcpy(d, s, size_t(i));
  for (; i + kLine <= bytes; i += kLine) write_line(d + i, s + i);
  __builtin_memcpy(d + i, s + i, size_t(bytes - i));
}

// to[i] = element(i) for 0 <= i < n past the caches, line by line; ahead(i) is called where a line begins.
template <class C, class F, class Ahead>
LETS_FN void fill_nontemporal(C* to, int64_t n, F element, Ahead ahead) {
  constexpr int64_t kOfLine = kLine / int64_t(sizeof(C));
  const int64_t head = before_line(to, n * int64_t(sizeof(C))) / int64_t(sizeof(C));
  int64_t i = 0;
  for (; i < head; ++i) to[i] = element(i);
  for (; i + kOfLine <= n; i += kOfLine) {
    ahead(i);
    alignas(kLine) C line[kOfLine];
#pragma GCC ivdep
    for (int64_t j = 0; j < kOfLine; ++j) line[j] = element(i + j);
    write_line(to + i, line);
  }
  for (; i < n; ++i) to[i] = element(i);
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
