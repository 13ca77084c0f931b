// The small ops on scalars: flags that say what a step has done, and whether it may be done.
#include "block.h"

namespace lets::cuda {
namespace {

LETS_KERNEL set_kernel(int64_t* flag, int64_t value) { *flag = value; }

LETS_KERNEL advance_kernel(int64_t* counter, const double* gate) { *counter += *gate != 0; }

constexpr int kValues = 64;
struct Addresses {
  const double* at[kValues];
};

LETS_KERNEL finite_kernel(LETS_PARAMETER Addresses values, int count, double* finite, int64_t* skipped, bool first,
                          bool last) {
  bool all = first || *finite != 0;
  for (int i = 0; i < count; ++i) all = is_finite(*values.at[i]) && all;
  *finite = all ? 1 : 0;
  if (last && !all) *skipped += 1;
}

}  // namespace

void select(int device) { set_device(device); }

void set(int64_t* flag, int64_t value, void* stream) { launch(&set_kernel, 1, 1, stream, flag, value); }

void advance(int64_t* counter, const double* gate, void* stream) {
  launch(&advance_kernel, 1, 1, stream, counter, gate);
}

void all_finite(const double* const* values, int64_t count, double* finite, int64_t* skipped, void* stream) {
  int64_t begin = 0;
  do {
    Addresses batch{};
    const int n = int(std::min<int64_t>(kValues, count - begin));
    for (int i = 0; i < n; ++i) batch.at[i] = values[begin + i];
    launch(&finite_kernel, 1, 1, stream, batch, n, finite, skipped, begin == 0, begin + n >= count);
    begin += n;
  } while (begin < count);
}

}  // namespace lets::cuda

#if !defined(LETS_EMULATED)
// Why no kernel of this library runs on the device (it was built for others), or null. For ctypes.
extern "C" __attribute__((visibility("default"))) const char* lets_kernels_refuses_device(int device) {
  int before = 0;
  cudaFuncAttributes found;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(&lets::cuda::set_kernel));
  cudaGetLastError();  // asked and answered
  cudaSetDevice(before);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif
