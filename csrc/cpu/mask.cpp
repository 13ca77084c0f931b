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
double masked_of(const chunk_of::masked_& c) {
  auto* const out = static_cast<T*>(c.out);
  auto* const v = static_cast<const T*>(c.vectors);
  auto* const mask = c.mask;
  using C = typename ArithmeticOf<T>::type;
  C v_buffer[kBlock], out_buffer[kBlock];
  T narrow_buffer[kBlock];
  uint32_t word_buffer[kDrawn];
  const C factor = C(1 / c.share);
  const uint64_t limit = word_limit(c.share);
  const bool all = limit > 0xFFFFFFFFu;
  const uint32_t below = uint32_t(limit);
  Sum sum;
  for (int64_t b = 0; b < c.numel; b += kBlock) {
    const int64_t n = smaller(kBlock, c.numel - b);
    const C* x = load<C>(v + b, v_buffer, n);
    Sum::add(sum, n, [=](int64_t i) { return double(x[i]) * double(x[i]); });
    if (mask) {
      T* to = c.nontemporal ? narrow_buffer : out + b;
      for (int64_t i = 0; i < n; ++i) {
        const T value = v[b + i];
        to[i] = kept(value, mask[b + i] != 0);
      }
      if (c.nontemporal) copy_nontemporal(out + b, to, n * int64_t(sizeof(T)));
    } else {
      const uint32_t* word = words(c.draw, c.position + b, word_buffer, n);
      C* to = result<C>(out + b, out_buffer, c.nontemporal);
      for (int64_t i = 0; i < n; ++i) to[i] = kept(x[i] * factor, all | (word[i] < below));
      store<C>(out + b, to, narrow_buffer, n, c.nontemporal);
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

}  // namespace

double masked_(const chunk_of::masked_& c) {
  return with_type(c.dtype, [&](auto type) { return masked_of<decltype(type)>(c); });
}

double count_above(const chunk_of::count_above& c) {
  const bool all = c.member < 0;
  const uint8_t member = uint8_t(c.member);
  int64_t count = 0;
  with_type(c.dtype, [&](auto type) {
    each_keys<decltype(type)>(c, [&](int64_t b, const int64_t* keys, int64_t n) {
      int64_t found = 0;
      for (int64_t i = 0; i < n; ++i)
        found += int64_t(keys[i] > c.threshold) & int64_t(all | (c.mask[b + i] == member));
      count += found;
    });
  });
  return double(count);
}

void select_(const chunk_of::select_& c) {
  const bool all = c.member < 0;
  const uint8_t member = uint8_t(c.member), value = uint8_t(c.value);
  const int64_t threshold = c.threshold;
  uint8_t* const mask = c.mask;
  with_type(c.dtype, [&](auto type) {
    each_keys<decltype(type)>(c, [=](int64_t b, const int64_t* keys, int64_t n) {
      uint8_t* own = mask + b;  // writing a byte may change whatever is captured by reference
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const bool chosen = (keys[i] > threshold) & (all | (own[i] == member));
        own[i] = chosen ? value : own[i];
      }
    });
  });
}

}  // namespace lets::cpu::LETS_ISA
