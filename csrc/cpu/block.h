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

// A block of storage as arithmetic values: the memory itself where the types agree, else converted into `buffer`.
template <class C, class T>
LETS_FN const C* load(const T* from, C* buffer, int64_t n, int64_t ahead) {
  prefetch(from + ahead, n * int64_t(sizeof(T)));
  if constexpr (sizeof(T) == sizeof(C)) {
    return from;
  } else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = widen(from[i]);
    return buffer;
  }
}

template <class C, class T>
LETS_FN const C* load(const T* from, C* buffer, int64_t n) {
  return load(from, buffer, n, n);
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

// Where a block's results are computed (the memory itself if it may be), and how they get to storage.
template <class C, class T>
LETS_FN C* result(T* to, C* buffer, bool nontemporal) {
  if constexpr (sizeof(T) == sizeof(C)) {
    return nontemporal ? buffer : to;
  } else {
    return buffer;
  }
}
template <class C, class T>
LETS_FN void store(T* to, const C* from, T* buffer, int64_t n, bool nontemporal) {
  if constexpr (sizeof(T) == sizeof(C)) {
    if (nontemporal) copy_nontemporal(to, from, n * int64_t(sizeof(T)));
  } else {
    T* target = nontemporal ? buffer : to;
    for (int64_t i = 0; i < n; ++i) narrow(from[i], target[i]);
    if (nontemporal) copy_nontemporal(to, buffer, n * int64_t(sizeof(T)));
  }
}

// Stores a block of results as `store` does, and gives them back as they are stored. `to` may be null: not stored.
template <class C, class T>
LETS_FN const C* keep(T* to, C* values, T* buffer, int64_t n, bool nontemporal) {
  if constexpr (sizeof(T) == sizeof(C)) {
    if (to && nontemporal) copy_nontemporal(to, values, n * int64_t(sizeof(T)));
  } else {
    for (int64_t i = 0; i < n; ++i) narrow(values[i], buffer[i]);
    for (int64_t i = 0; i < n; ++i) values[i] = widen(buffer[i]);
    if (to) copy(to, buffer, n * int64_t(sizeof(T)), nontemporal);
  }
  return values;
}

// The norm of each element's filter, plus `xi`.
template <class C>
LETS_FN void filter_scales(const Scaling& s, int64_t begin, C xi, C* buffer, int64_t n) {
  const auto* norms = static_cast<const C*>(s.norms);
  const int64_t element = s.offset + begin;
  int64_t row = (element / s.row_length) % s.row_count, left = s.row_length - element % s.row_length;
  for (int64_t i = 0; i < n;) {
    const int64_t end = smaller(n, i + left);
    const C t = adaptive_scale(norms[row], xi);
    for (; i < end; ++i) buffer[i] = t;
    left = s.row_length;
    row = row + 1 == s.row_count ? 0 : row + 1;
  }
}

// T of a block, or null where T = 1. `theta` may be null unless the scaling is element-wise.
template <class C>
LETS_FN const C* scales(const Scaling& s, const C* theta, const C* v, int64_t begin, C* buffer, int64_t n) {
  if (s.row_length == kUnscaled) return nullptr;
  const C xi = C(s.xi);
  if (s.row_length == kFisher) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = fisher_scale(v[i], xi);
    return buffer;
  }
  if (s.row_length == kElementWise) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = adaptive_scale(absolute(theta[i]), xi);
    return buffer;
  }
  filter_scales(s, begin, xi, buffer, n);
  return buffer;
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
  LETS_FN double total(const Sum& sum) {
    double lane[kLanes];
    for (int l = 0; l < kLanes; ++l) lane[l] = sum.lane[l];
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
    return lane[0];
  }
};

// Calls f(T{}) with the storage type.
template <class F>
LETS_FN auto with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float64:
      return f(double{});
    case Dtype::bfloat16:
      return f(BFloat16{});
    case Dtype::float16:
      return f(Half{});
    default:
      return f(float{});
  }
}

}  // namespace
}  // namespace lets::cpu::LETS_ISA
