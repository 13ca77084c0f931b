// Random numbers for the elements that a thread holds.
#pragma once

#include "../random.h"
#include "block.h"

namespace lets::cuda {

// The position of a chunk's first element in its bucket.
template <class Each>
LETS_DEVICE int64_t position_of(const Piece<Each>& piece) {
  return int64_t(reinterpret_cast<intptr_t>(piece.run.address[kStart])) + piece.begin;
}

LETS_DEVICE Draw draw_of(const int64_t* random, uint32_t draws) {
  return {uint64_t(random[0]), uint64_t(random[1]), draws};
}

// The word of one position, by choices: an index that is not known when compiled would put the words into memory.
LETS_DEVICE uint32_t word_at(const Words& words, int64_t position) {
  const uint32_t even = position & 2 ? words.word[2] : words.word[0];
  const uint32_t odd = position & 2 ? words.word[3] : words.word[1];
  return position & 1 ? odd : even;
}

// The words of V elements from a position on, a multiple of V: a pack of four has a call of Philox to itself.
template <int V>
LETS_DEVICE Values<uint32_t, V> words_at(const Draw& draw, int64_t position) {
  Values<uint32_t, V> found;
  if constexpr (V >= 4) {
#pragma unroll
    for (int j = 0; j < V; j += 4) {
      const Words words = philox(draw, uint64_t(position + j) / 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) found.value[j + k] = words.word[k];
    }
  } else {
    const Words words = philox(draw, uint64_t(position) / 4);
#pragma unroll
    for (int j = 0; j < V; ++j) found.value[j] = word_at(words, position + j);
  }
  return found;
}

// The normal numbers of the same elements; two of them come from two words.
template <int V>
LETS_DEVICE Values<float, V> normals_at(const Draw& draw, int64_t position) {
  Values<float, V> found;
  constexpr int kWords = V < 2 ? 2 : V;
  const auto words = words_at<kWords>(draw, V < 2 ? position & ~int64_t(1) : position);
  if constexpr (V < 2) {
    const Pair pair = normal_pair(words.value[0], words.value[1]);
    found = {{position & 1 ? pair.second : pair.first}};
  } else {
#pragma unroll
    for (int j = 0; j < V; j += 2) {
      const Pair pair = normal_pair(words.value[j], words.value[j + 1]);
      found.value[j] = pair.first;
      found.value[j + 1] = pair.second;
    }
  }
  return found;
}

}  // namespace lets::cuda
