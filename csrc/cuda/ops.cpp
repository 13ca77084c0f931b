// The ops on CUDA devices, and their registration: gathers the addresses, enqueues the kernels.
//
// Compiled by the host's compiler alone; what needs nvcc is behind kernels.h. Nothing here waits for the device.
#include "rows.h"

namespace lets {
namespace {

struct Cuda : cuda::Device {
  using Device::Device;

  template <class C>
  auto run(const C& c) const {
    const auto rows = rows_of(c);
    if constexpr (std::is_void_v<typename C::Result>) {
      cuda::enqueue(c.launched(rows.data(), stream, nullptr));
    } else {
      constexpr int64_t totals = sizeof(typename C::Result) / sizeof(double);
      const Tensor sums = empty_doubles(totals * cuda::kSumElements, *this);
      cuda::enqueue(c.launched(rows.data(), stream, static_cast<double*>(sums.data_ptr())));
      return totals == 1 ? first_of(sums) : first_of(sums, totals);
    }
  }

  Tensor run(const call_of::all_finite_& c) const {
    const Tensor finite = empty_doubles(1, *this);
    cuda::all_finite(c.values.data(), int64_t(c.values.size()), static_cast<double*>(finite.data_ptr()), c.skipped,
                     stream);
    return first_of(finite);
  }
};

}  // namespace
}  // namespace lets

#if defined(LETS_EMULATED)
STABLE_TORCH_LIBRARY(lets_kernels_emulated, m) { lets::define(m); }
STABLE_TORCH_LIBRARY_IMPL(lets_kernels_emulated, CPU, m) { lets::implement<lets::Cuda>(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(lets_kernels, CUDA, m) { lets::implement<lets::Cuda>(m); }
#endif
