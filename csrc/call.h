// A call of an op: its arguments, checked and turned into addresses in the same way on every device.
//
// generate.py makes a struct of each op's arguments, as lets_kernels/ops/declared.py has them. For restore_ it is
//
//   struct restore_ : Call {
//     using Result = void;
//     const Runs params;          // Written[Tensors]
//     const Runs saved;           // Flat
//     int64_t* const dirty;       // Written[Count]
//     restore_(Where where, const Tensors& params, const Tensor& saved, const Tensor& dirty, const Tensor& table);
//     chunk_of::restore_ at(const Chunk& c, bool nontemporal) const;                               // for a CPU kernel
//     launch_of::restore_ launched(const cuda::Run* runs, const Each* each, void* queue, double* sums) const;  // CUDA
//     Each each(int64_t i) const;                                 // what a CUDA kernel gets of run i beside addresses
//     void addresses(int64_t i, char** to) const;                                                  // of run i
//   };
#pragma once

#include "runs.h"

namespace lets {

struct Call {
  Call(Where where, const Tensor& runs, const Tensors& first, const char* what)
      : where(where), table(runs), dtype(dtype_of_list(first, what)) {}
  // Where the chunk's first element stands in the bucket.
  int64_t position_of(const Chunk& c) const { return table[c.run].start + c.begin; }

  const Where where;
  const Table table;
  const Dtype dtype;
};

// What the kinds of arguments do not say.
template <class C>
void check(const C& c) {
  if constexpr (requires { c.q; }) STD_TORCH_CHECK(c.q >= 1, "q must be at least 1, not ", c.q);
  if constexpr (requires { c.momenta; })
    for (int64_t i = 0; i < c.table.size(); ++i)
      STD_TORCH_CHECK(c.table.total() == 0 || c.momenta.empty() == (c.momentum.at(i) == 0),
                      "momenta go with a momentum that is not zero");
  if constexpr (requires { c.share; })
    STD_TORCH_CHECK(c.mask || (c.share > 0 && c.share <= 1), "share must be above 0 and at most 1, not ", c.share);
  if constexpr (requires { c.member; }) check_mask_value(c.member, -1, "member");
  if constexpr (requires { c.value; }) check_mask_value(c.value, 0, "value");
  if constexpr (requires { c.scaling, c.precisions; })
    if (c.precisions.empty()) c.scaling.check_given();
}

}  // namespace lets

#include <calls.h>
