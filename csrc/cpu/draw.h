// The random numbers of a block, computed side by side.
#pragma once

#include "../random.h"
#include "block.h"

namespace lets::cpu::LETS_ISA {
namespace {

#if defined(__SSE2__)
#if defined(__AVX512F__)
using Register = __m512i;
LETS_FN Register product(Register a, Register b) { return _mm512_maskz_mul_epu32(0xFF, a, b); }
#elif defined(__AVX2__)
using Register = __m256i;
LETS_FN Register product(Register a, Register b) { return _mm256_mul_epu32(a, b); }
#else
using Register = __m128i;
LETS_FN Register product(Register a, Register b) { return _mm_mul_epu32(a, b); }
#endif
using Lanes = uint64_t __attribute__((vector_size(sizeof(Register))));
constexpr int64_t kAtOnce = 2 * int64_t(sizeof(Lanes) / sizeof(uint64_t));

constexpr uint64_t kNumbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static_assert(sizeof(kNumbers) >= size_t(kAtOnce) * sizeof(uint64_t));

LETS_FN Lanes all(uint64_t x) { return Lanes{} + x; }
LETS_FN Lanes product(Lanes a, uint32_t b) {
  return Lanes(product(Register(a), Register(all(b))));  // of the lower halves
}

// `philox` for kAtOnce calls. Each has a lane of 64 bits, whose upper half may hold anything: no instruction is spent
// on moving halves about, which is most of what compilers make of the plain function.
LETS_FN void philox_at_once(const Draw& draw, uint64_t first, uint32_t* to) {
  constexpr int kPerRegister = int(kAtOnce / 2);
  Lanes c0[2], c1[2], c2[2], c3[2];
  for (int half = 0; half < 2; ++half) {
    __builtin_memcpy(&c0[half], kNumbers + half * kPerRegister, sizeof(Lanes));
    c0[half] += all(first);
    c1[half] = c0[half] >> 32;
    c2[half] = all(draw.count);
    c3[half] = all(draw.stream);
  }
  uint32_t k0 = uint32_t(draw.seed), k1 = upper(draw.seed);
  for (int round = 0; round < 10; ++round) {
    for (int half = 0; half < 2; ++half) {
      const Lanes p0 = product(c0[half], 0xD2511F53u), p1 = product(c2[half], 0xCD9E8D57u);
      c0[half] = (p1 >> 32) ^ c1[half] ^ all(k0);
      c1[half] = p1;
      c2[half] = (p0 >> 32) ^ c3[half] ^ all(k1);
      c3[half] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int half = 0; half < 2; ++half) {
    const Lanes lower = all(0xFFFFFFFFu);
    const Lanes front = (c0[half] & lower) | (c1[half] << 32), back = (c2[half] & lower) | (c3[half] << 32);
    for (int l = 0; l < kPerRegister; ++l) {
      const uint64_t words[2] = {front[l], back[l]};
      __builtin_memcpy(to + 4 * (half * kPerRegister + l), words, sizeof(words));
    }
  }
}
#else
constexpr int64_t kAtOnce = 1;
LETS_FN void philox_at_once(const Draw& draw, uint64_t first, uint32_t* to) {
  const Words w = philox(draw, first);
  __builtin_memcpy(to, w.word, sizeof(w.word));
}
#endif

// A block may begin and end in the middle of a quad of words, and quads come several at a time.
constexpr int64_t kDrawn = kBlock + 4 + 4 * kAtOnce;

// The words at n positions that follow each other; the first may be any.
LETS_FN const uint32_t* words(const Draw& draw, int64_t position, uint32_t (&buffer)[kDrawn], int64_t n) {
  const int64_t first = position / 4, calls = (position + n + 3) / 4 - first;
  for (int64_t i = 0; i < calls; i += kAtOnce) philox_at_once(draw, uint64_t(first + i), buffer + 4 * i);
  return buffer + position % 4;
}

// Standard-normal numbers of n positions.
LETS_FN const float* normals(const Draw& draw, int64_t position, float (&buffer)[kDrawn], int64_t n) {
  uint32_t drawn[kDrawn];
  const int64_t skipped = position % 4;
  words(draw, position, drawn, n);
  for (int64_t i = 0; i < (skipped + n + 1) / 2; ++i) {
    const Pair pair = normal_pair(drawn[2 * i], drawn[2 * i + 1]);
    buffer[2 * i] = pair.first;
    buffer[2 * i + 1] = pair.second;
  }
  return buffer + skipped;
}

}  // namespace
}  // namespace lets::cpu::LETS_ISA
