// The random numbers of a block, computed side by side.
#pragma once

#include "../random.h"
#include "block.h"

namespace lets::cpu::LETS_ISA {
namespace {

constexpr int64_t kDrawn = kBlock + 4;  // whole calls of Philox: a block may begin and end within one

// The words of n positions, from any position on.
LETS_FN const uint32_t* words(const Draw& draw, int64_t position, uint32_t (&buffer)[kDrawn], int64_t n) {
  const int64_t first = position / 4, calls = (position + n + 3) / 4 - first;
  for (int64_t i = 0; i < calls; ++i) {
    const Words w = philox(draw, uint64_t(first + i));
    buffer[4 * i] = w.word[0];
    buffer[4 * i + 1] = w.word[1];
    buffer[4 * i + 2] = w.word[2];
    buffer[4 * i + 3] = w.word[3];
  }
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
