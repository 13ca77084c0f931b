// Faults on purpose: each hands an op memory that it must not have, and a sanitizer or a guard band must tell.
//
// The ops trust the addresses of a packed list, and that runs do not overlap, which is how the faults get past them.
#pragma once

#include "cases.h"

namespace sanitize {

using Restore = void(const Tensors&, const Tensor&, const Tensor&, const Tensor&);
using GradNorm = Tensor(const Tensors&, const Tensors&, const Tensor&, const std::optional<Tensor>&,
                        const std::vector<double>&, double);

inline Tensor vector_of(void* data, int64_t numel) { return Tensor(data, ScalarType::Float, {numel}, {1}); }
inline Tensor table_of(std::vector<Run>& runs) {
  return Tensor(runs.data(), ScalarType::Long, {int64_t(runs.size()), lets::kColumns}, {lets::kColumns, 1});
}
inline Tensors packed(std::vector<int64_t>& addresses, int64_t& anchor) {
  return {Tensor(addresses.data(), ScalarType::Long, {int64_t(addresses.size())}, {1}),
          Tensor(&anchor, ScalarType::Long, {}, {})};
}

// Two runs that are the same stretch of a flat buffer: two threads write it. Long enough that the threads take turns
// even on one busy core, where one alone would be no race. TSan overlooks the stores past the caches: with chunks of
// full size it must be too short for those, small chunks have ends that are stored otherwise.
inline void race() {
  constexpr int64_t kNumel = lets::kChunk < 65536 ? int64_t(1) << 22 : 1000000;
  std::vector<float> theta(kNumel), saved(kNumel);
  std::vector<Run> runs{{0, kNumel, -1, 0, 0}, {0, kNumel, -1, 0, 0}};
  standin::threads = 2;
  for (int i = 0; i < 20; ++i) {
    auto dirty = flag(1);
    standin::op<Restore>("restore_")({vector_of(theta.data(), kNumel)}, vector_of(saved.data(), kNumel), dirty.tensor,
                                     table_of(runs));
  }
}

// A parameter that is one element shorter than its run, written to behind its end; a gradient, read there.
inline void write_past_the_end() {
  constexpr int64_t kNumel = 1000;
  std::vector<float> theta(kNumel - 1);
  theta.shrink_to_fit();
  std::vector<float> saved(kNumel);
  std::vector<Run> runs{{0, kNumel, -1, 0, 0}};
  std::vector<int64_t> addresses{lets::kPacked[0], lets::kPacked[1], 0, reinterpret_cast<int64_t>(theta.data())};
  int64_t anchor = 0;
  auto dirty = flag(1);
  auto gate = number(1.0);
  using Sgd =
      void(const Tensors&, const Tensors&, const Tensors&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
           const std::vector<double>&, const std::vector<double>&, const std::vector<double>&, bool, bool);
  standin::op<Sgd>("restore_sgd_")(packed(addresses, anchor), {vector_of(saved.data(), kNumel)}, {},
                                   vector_of(saved.data(), kNumel), dirty.tensor, table_of(runs), gate.tensor, {0.1},
                                   {0.0}, {0.0}, false, false);
}
inline void read_past_the_end() {
  constexpr int64_t kNumel = 1000;
  constexpr int64_t kBytes = (kNumel - 1) * int64_t(sizeof(float));
  Memory v(kBytes, 0);
  v.claim(0, kBytes);
  v.close();
  std::vector<Run> runs{{0, kNumel, -1, 0, 0}};
  std::vector<int64_t> addresses{lets::kPacked[0], lets::kPacked[1], 0, reinterpret_cast<int64_t>(v.data())};
  int64_t anchor = 0;
  standin::op<GradNorm>("grad_norm")(packed(addresses, anchor), {}, table_of(runs), std::nullopt, {0.0}, 2.0);
}

// A write into a guard band that no sanitizer sees: the bands' pattern must tell.
inline void write_into_a_band() {
  Memory memory(1000, 0);
  memory.claim(0, 1000);
  memory.data()[1003] = 0;
  memory.verify("a buffer");
}

// Elements that do not lie at a multiple of their size.
inline void unaligned() {
  std::vector<float> v(1001);
  std::vector<Run> runs{{0, 1000, -1, 0, 0}};
  std::vector<int64_t> addresses{lets::kPacked[0], lets::kPacked[1], 0, reinterpret_cast<int64_t>(v.data()) + 1};
  int64_t anchor = 0;
  standin::op<GradNorm>("grad_norm")(packed(addresses, anchor), {}, table_of(runs), std::nullopt, {0.0}, 2.0);
}

inline void commit(const std::string& fault) {
  if (fault == "race") return race();
  if (fault == "write") return write_past_the_end();
  if (fault == "read") return read_past_the_end();
  if (fault == "band") return write_into_a_band();
  if (fault == "unaligned") return unaligned();
  throw std::logic_error("no fault is called '" + fault + "'; there are race, write, read, band and unaligned");
}

}  // namespace sanitize
