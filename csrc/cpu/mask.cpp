// Masks of one chunk. masked: reads v (and the mask); writes out. count_above, select: read v (where given) and the
// mask; select writes the mask.
#include "draw.h"

namespace lets::cpu::LETS_ISA {
namespace {

LETS_FN float kept(float x, bool keep) { return keep ? x : 0.0f; }
LETS_FN double kept(double x, bool keep) { return keep ? x : 0.0; }
LETS_FN BFloat16 kept(BFloat16 x, bool keep) { return {uint16_t(keep ? x.bits : 0)}; }
LETS_FN Half kept(Half x, bool keep) { return {uint16_t(keep ? x.bits : 0)}; }

template <class T>
double walk(const chunk_of::masked_& c) {
  using C = Arithmetic<T>;
  Output<T> out(c.out, c.nontemporal);
  Input<T> v(c.vectors);
  auto* const mask = c.mask;
  uint32_t word_buffer[kDrawn];
  const C factor = C(1 / c.share);
  const uint64_t limit = word_limit(c.share);
  const bool all = limit > 0xFFFFFFFFu;
  const uint32_t below = uint32_t(limit);
  Sum sum;
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const C* x = load(v, b, n);
    Sum::add_squares(sum, n, x);
    if (mask) {
      const T* from = v.list + b;
      T* to = c.nontemporal ? out.narrowed : out.list + b;
      for (int64_t i = 0; i < n; ++i) to[i] = kept(from[i], mask[b + i] != 0);
      if (c.nontemporal) copy_nontemporal(out.list + b, to, n * int64_t(sizeof(T)));
    } else {
      const uint32_t* word = words(c.draw, c.position + b, word_buffer, n);
      C* to = result(out, b);
      for (int64_t i = 0; i < n; ++i) to[i] = kept(x[i] * factor, all | (word[i] < below));
      store(out, to, b, n);
    }
  }
  finish(c.nontemporal);
  return Sum::total(sum);
}

// f(block's begin, its keys, n) for every block. Without vectors keys are of the words alone.
template <class T, class C, class F>
LETS_FN void each_keys(const C& c, F f) {
  auto* const v = static_cast<const T*>(c.vectors);
  uint32_t word_buffer[kDrawn];
  int64_t keys[kBlock];
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const uint32_t* word = words(c.draw, c.position + b, word_buffer, n);
    if (v) {
      for (int64_t i = 0; i < n; ++i) keys[i] = key_of(float(widen(v[b + i])), word[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) keys[i] = key_of(word[i]);
    }
    f(b, keys, n);
  }
}

template <class T>
double walk(const chunk_of::count_above& c) {
  const bool all = c.member < 0;
  const uint8_t member = uint8_t(c.member);
  int64_t count = 0;
  each_keys<T>(c, [&](int64_t b, const int64_t* keys, int64_t n) {
    int64_t found = 0;
    for (int64_t i = 0; i < n; ++i) found += int64_t(keys[i] > c.threshold) & int64_t(all | (c.mask[b + i] == member));
    count += found;
  });
  return double(count);
}

template <class T>
void walk(const chunk_of::select_& c) {
  const bool all = c.member < 0;
  const uint8_t member = uint8_t(c.member), value = uint8_t(c.value);
  const int64_t threshold = c.threshold;
  uint8_t* const mask = c.mask;
  each_keys<T>(c, [=](int64_t b, const int64_t* keys, int64_t n) {
    uint8_t* own = mask + b;  // writing a byte may change whatever is captured by reference
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const bool chosen = (keys[i] > threshold) & (all | (own[i] == member));
      own[i] = chosen ? value : own[i];
    }
  });
}

}  // namespace

LETS_OP(masked_)
LETS_OP(count_above)
LETS_OP(select_)

}  // namespace lets::cpu::LETS_ISA
