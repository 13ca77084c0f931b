// The ops on CUDA devices, and their registration: gathers the addresses, enqueues the kernels.
//
// Compiled by the host's compiler alone; what needs nvcc is behind kernels.h. Nothing here waits for the device.
#include <vector>

#include "../call.h"
#include "kernels.h"
#if defined(LETS_EMULATED)
#include "emulated_device.h"  // tests/emulator: the same kernels on CPU tensors
#else
#include "device.h"
#endif

namespace lets {
namespace {

// The runs of a call: their addresses in each of its lists, and their places in the bucket.
template <class C>
std::vector<cuda::Run> runs_of(const C& c) {
  static_assert(C::lists <= cuda::kLists, "a run has no place for so many lists");
  std::vector<cuda::Run> runs(size_t(c.table.size()));
  for (int64_t i = 0; i < c.table.size(); ++i) {
    cuda::Run& run = runs[size_t(i)];
    run = {{}, c.table[i].numel};
    run.address[cuda::kStart] = reinterpret_cast<char*>(intptr_t(c.table[i].start));
    c.addresses(i, run.address);
  }
  return runs;
}
// What a kernel gets of each run beside that.
template <class C>
std::vector<typename C::Each> each_of(const C& c) {
  std::vector<typename C::Each> each;
  if constexpr (std::is_empty_v<typename C::Each>) return each;
  each.reserve(size_t(c.table.size()));
  for (int64_t i = 0; i < c.table.size(); ++i) each.push_back(c.each(i));
  return each;
}

struct Cuda : cuda::Device {
  using Device::Device;

  template <class C>
  auto run(const C& c) const {
    const auto runs = runs_of(c);
    const auto each = each_of(c);
    if constexpr (std::is_void_v<typename C::Result>) {
      cuda::enqueue(c.launched(runs.data(), each.data(), stream, nullptr));
    } else {
      constexpr int64_t totals = sizeof(typename C::Result) / sizeof(double);
      const Tensor sums = empty_numbers(totals * cuda::kSumElements, type(), index());
      cuda::enqueue(c.launched(runs.data(), each.data(), stream, static_cast<double*>(sums.data_ptr())));
      return first_of(sums, totals);
    }
  }

  Tensor run(const call_of::all_finite_& c) const {
    const Tensor finite = empty_numbers(1, type(), index());
    cuda::all_finite(c.values.data(), int64_t(c.values.size()), static_cast<double*>(finite.data_ptr()), c.skipped,
                     stream);
    return finite;
  }

 private:
  // A view of the first numbers: sums and their slots are one allocation.
  static Tensor first_of(const Tensor& t, int64_t numel) {
    const int64_t stride = 1;
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), numel > 1, &numel, &stride, 0, &handle));
    return Tensor(handle);
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
