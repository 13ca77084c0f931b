// The CPU kernels: one function an op for one chunk, in a table with one entry an op, one table an instruction set.
// No torch and no standard library here: these files are compiled several times, with different instructions.
#pragma once

#include "../layout.h"
#include "../random.h"

#include <declared.h>  // made by generate.py, of what stands above

namespace lets::cpu {

// chunk_of::<op> has the addresses of the chunk's first elements. `nontemporal`: write around the caches what is not
// read back. filter_norms gets a whole run, and writes the norm of the filter that `scaling.offset` counts.
struct Kernels {
#define LETS_ENTRY(op, result)       \
  result (*op)(const chunk_of::op&); \
  result operator()(const chunk_of::op& c) const { return op(c); }
  LETS_OPS(LETS_ENTRY)
#undef LETS_ENTRY
};

// Hidden: a kernel that is missing is then an error of the linker, which names it.
#define LETS_DECLARE(op, result) [[gnu::visibility("hidden")]] result op(const chunk_of::op&);
#define LETS_DECLARE_KERNELS(isa) \
  namespace isa {                 \
  LETS_OPS(LETS_DECLARE)          \
  }
LETS_DECLARE_KERNELS(baseline)
LETS_DECLARE_KERNELS(avx2)
LETS_DECLARE_KERNELS(avx512)
#undef LETS_DECLARE_KERNELS
#undef LETS_DECLARE

}  // namespace lets::cpu
