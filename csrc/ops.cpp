// The ops on the CPU: their schemas and their registration.
#include <algorithm>

#include "call.h"
#include "chunks.h"
#include "isa.h"

namespace lets {
namespace {

struct Cpu {
  Cpu(const Tensors&, const Tensors&) {}

  template <class C>
  static auto kernel_of(const C& c) {
    return
        [&c, nontemporal = is_nontemporal(c)](const Chunk& chunk) { return cpu::kernels()(c.at(chunk, nontemporal)); };
  }

  // An op on chunks that know nothing of each other, and whose sums are its result.
  template <class C>
  auto run(const C& c) const {
    if constexpr (requires {
                    c.saved;
                    c.gate;
                  }) {
      step(c);
    } else if constexpr (std::is_void_v<typename C::Result>) {
      over_chunks(c.table, kernel_of(c));
    } else {
      return sum_over_chunks<typename C::Result>(c.table, kernel_of(c));
    }
  }

  void run(const call_of::filter_norms& c) const {
    // Filters are small and many: a thread takes a chunk's worth of them at a time.
    struct Filters {
      int64_t run, begin, end;
    };
    std::vector<Filters> work;
    for (int64_t i = 0; i < c.table.size(); ++i) {
      const Run& run = c.table[i];
      if (run.filter_length < 1) continue;
      const int64_t step = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, run.numel / run.filter_count));
      for (int64_t f = 0; f < run.filter_count; f += step) work.push_back({i, f, std::min(f + step, run.filter_count)});
    }
    for_each(int64_t(work.size()), c.table.total(), [&](int64_t i) {
      const Filters& some = work[size_t(i)];
      auto run = c.at({some.run, 0, c.table[some.run].numel}, false);
      for (int64_t filter = some.begin; filter < some.end; ++filter) {
        run.scaling.offset = filter;
        cpu::kernels()(run);
      }
    });
  }

  void run(const call_of::perturb_& c) const {
    over_chunks(c.table, kernel_of(c));
    *c.dirty = 1;
  }

  void run(const call_of::restore_& c) const {
    if (*c.dirty != 0) copy_back(c);
    *c.dirty = 0;
  }

  void run(const call_of::combine_& c) const {
    if (*c.gate != 0) over_chunks(c.table, kernel_of(c));
  }

  Tensor run(const call_of::average_& c) const {
    const Tensor sum = sum_over_chunks<double>(c.table, kernel_of(c));
    *c.updates += *c.gate != 0;
    return sum;
  }

  Tensor run(const call_of::largest& c) const {
    double highest = 0;
    for (double p : of_each_chunk<double>(c.table, kernel_of(c)))
      highest = p > highest || p != p ? p : highest;  // a NaN stays
    return tensor_of(highest);
  }

  Tensor run(const call_of::all_finite_& c) const {
    bool finite = true;
    for (const double* v : c.values) finite = is_finite(*v) && finite;
    if (!finite) *c.skipped += 1;
    return tensor_of(finite ? 1.0 : 0.0);
  }

  const Where where;

 private:
  template <class C>
  static void copy_back(const C& c) {
    over_chunks(c.table, [&, nontemporal = is_nontemporal(c)](const Chunk& chunk) {
      cpu::kernels()(
          chunk_of::restore_{c.dtype, chunk.numel, nontemporal, c.params.at(chunk), c.saved.at(chunk), *c.dirty});
    });
  }

  // A base optimizer's step, from the saved weights where those are perturbed; without it they are restored.
  template <class C>
  static void step(const C& c) {
    const bool perturbed = *c.dirty != 0;
    if (*c.gate != 0) {
      if constexpr (requires { c.steps; })
        for (float* s : c.steps) *s += 1;
      over_chunks(c.table, [&, nontemporal = is_nontemporal(c)](const Chunk& chunk) {
        auto at = c.at(chunk, nontemporal);
        if (!perturbed) at.saved = at.params;
        cpu::kernels()(at);
      });
    } else if (perturbed) {
      copy_back(c);
    }
    *c.dirty = 0;
  }
};

}  // namespace
}  // namespace lets

STABLE_TORCH_LIBRARY(lets_kernels, m) { lets::define(m); }
STABLE_TORCH_LIBRARY_IMPL(lets_kernels, CPU, m) { lets::implement<lets::Cpu>(m); }
