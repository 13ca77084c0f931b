// Random numbers that are computed where they are used, from a counter: Philox 4x32-10 (Salmon et al., SC 2011).
//
// Element e of a run has the position start + e in its bucket. Positions 4k to 4k + 3 share one call of Philox. All of
// it is integer arithmetic and float32 operations that round in one way only, so every backend has the same bits.
#pragma once

#include "math.h"

namespace lets {

// Who draws: the optimizer's seed, the step's count, and which of its streams.
struct Draw {
  uint64_t seed, count;
  uint32_t stream;
};

struct Words {
  uint32_t word[4];
};

LETS_FN uint32_t upper(uint64_t x) { return uint32_t(x >> 32); }

LETS_FN Words philox(const Draw& draw, uint64_t k) {
  uint32_t c0 = uint32_t(k), c1 = upper(k), c2 = uint32_t(draw.count), c3 = draw.stream;
  uint32_t k0 = uint32_t(draw.seed), k1 = upper(draw.seed);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = upper(p1) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = upper(p0) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// ln u: ln(2^e m) with m within sqrt 2 of 1, and ln m = 2 artanh((m - 1)/(m + 1)).
LETS_FN float logarithm(float u) {
  const int32_t bits = bit_cast<int32_t>(u);
  const int32_t e = (bits - 0x3F3504F3) >> 23;
  const float m = bit_cast<float>(bits - e * 0x800000);
  const float s = (m - 1.0f) / (m + 1.0f);
  const float z = s * s;
  const float series = (((float(1. / 9) * z + float(1. / 7)) * z + float(1. / 5)) * z + float(1. / 3)) * z + 1.0f;
  return float(e) * float(0.6931471805599453) + (s + s) * series;
}

struct Pair {
  float first, second;
};

// Two standard-normal numbers from two words: Box and Muller (1958).
LETS_FN Pair normal_pair(uint32_t a, uint32_t b) {
  const float u = float(a) * 0x1p-32f + 0x1p-33f;
  const float radius = square_root(-2.0f * logarithm(u));
  const uint32_t quadrant = b >> 30;
  const float x = (float(b & 0x3FFFFFFFu) * 0x1p-30f - 0.5f) * float(1.5707963267948966);
  const float z = x * x;
  const float sine =
      x * ((((float(1. / 362880) * z - float(1. / 5040)) * z + float(1. / 120)) * z - float(1. / 6)) * z + 1.0f);
  const float cosine = (((float(1. / 40320) * z - float(1. / 720)) * z + float(1. / 24)) * z - 0.5f) * z + 1.0f;
  const bool swap = quadrant % 2 == 1, flip = quadrant >= 2;
  const float c = swap ? -sine : cosine, s = swap ? cosine : sine;
  return {radius * (flip ? -c : c), radius * (flip ? -s : s)};
}

// A word is below this with the given probability.
LETS_FN uint64_t word_limit(double probability) { return uint64_t(probability * 4294967296.0); }

}  // namespace lets
