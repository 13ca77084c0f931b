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
double masked_of(T* out, const T* v, const uint8_t* mask, int64_t numel, const Draw& draw, int64_t position,
                 double share, bool stream) {
  using C = typename ArithmeticOf<T>::type;
  C v_buffer[kBlock], out_buffer[kBlock];
  T narrow_buffer[kBlock];
  uint32_t word_buffer[kDrawn];
  const C factor = C(1 / share);
  const uint64_t limit = word_limit(share);
  const bool all = limit > 0xFFFFFFFFu;
  const uint32_t below = uint32_t(limit);
  Sum sum;
  for (int64_t b = 0; b < numel; b += kBlock) {
    const int64_t n = smaller(kBlock, numel - b);
    const C* x = load<C>(v + b, v_buffer, n);
    Sum::add(sum, n, [=](int64_t i) { return double(x[i]) * double(x[i]); });
    if (mask) {
      T* to = stream ? narrow_buffer : out + b;
      for (int64_t i = 0; i < n; ++i) {
        const T value = v[b + i];
        to[i] = kept(value, mask[b + i] != 0);
      }
      if (stream) stream_copy(out + b, to, n * int64_t(sizeof(T)));
    } else {
      const uint32_t* word = words(draw, position + b, word_buffer, n);
      C* to = result<C>(out + b, out_buffer, stream);
      for (int64_t i = 0; i < n; ++i) to[i] = kept(x[i] * factor, all | (word[i] < below));
      store<C>(out + b, to, narrow_buffer, n, stream);
    }
  }
  finish(stream);
  return Sum::total(sum);
}

// f(block's begin, its keys, n) for every block. `v` null: keys are of the words alone.
template <class T, class F>
LETS_FN void each_keys(const T* v, int64_t numel, const Draw& draw, int64_t position, F f) {
  uint32_t word_buffer[kDrawn];
  int64_t keys[kBlock];
  for (int64_t b = 0; b < numel; b += kBlock) {
    const int64_t n = smaller(kBlock, numel - b);
    const uint32_t* word = words(draw, position + b, word_buffer, n);
    if (v) {
      for (int64_t i = 0; i < n; ++i) keys[i] = key_of(float(widen(v[b + i])), word[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) keys[i] = key_of(word[i]);
    }
    f(b, keys, n);
  }
}

}  // namespace

double masked(Dtype dtype, void* out, const void* v, const uint8_t* mask, int64_t numel, const Draw& draw,
              int64_t position, double share, bool stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return masked_of(static_cast<T*>(out), static_cast<const T*>(v), mask, numel, draw, position, share, stream);
  });
}

int64_t count_above(Dtype dtype, const void* v, const uint8_t* mask, int64_t numel, int64_t position,
                    const Above& above) {
  const bool all = above.member < 0;
  const uint8_t member = uint8_t(above.member);
  int64_t count = 0;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    each_keys(static_cast<const T*>(v), numel, above.draw, position, [&](int64_t b, const int64_t* keys, int64_t n) {
      int64_t found = 0;
      for (int64_t i = 0; i < n; ++i)
        found += int64_t(keys[i] > above.threshold) & int64_t(all | (mask[b + i] == member));
      count += found;
    });
  });
  return count;
}

void select(Dtype dtype, uint8_t* mask, const void* v, int64_t numel, int64_t position, const Above& above,
            uint8_t value) {
  const bool all = above.member < 0;
  const uint8_t member = uint8_t(above.member);
  const int64_t threshold = above.threshold;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    each_keys(static_cast<const T*>(v), numel, above.draw, position, [=](int64_t b, const int64_t* keys, int64_t n) {
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
