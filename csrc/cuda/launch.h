// What of CUDA the kernels use. tests/emulator has the same names for a C++ compiler, so that their logic runs, and is
// checked, on machines without a GPU.
#pragma once

#if !defined(LETS_EMULATED)

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../math.h"

#define LETS_DEVICE static __device__ __forceinline__
// A kernel of 256 threads a block, and one that may use the registers for so many blocks on a multiprocessor: without
// that leave the compiler spills a register or two for the sake of one more block.
#define LETS_KERNEL static __global__ void __launch_bounds__(256)
#define LETS_KERNEL_FOR(blocks) static __global__ void __launch_bounds__(256, blocks)
#define LETS_SHARED __shared__
#define LETS_PARAMETER const __grid_constant__

namespace lets::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("lets_kernels: ") + what + ": " + cudaGetErrorString(error));
}

// This library has a CUDA runtime of its own, which must be told as torch's was.
inline void set_device(int device) { check(cudaSetDevice(device), "the device cannot be used"); }

// Enqueues kernel(arguments...); throws if the launch is refused.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, const Parameters&... arguments) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(unsigned(threads)),
                         pointers, 0, static_cast<cudaStream_t>(stream)),
        "a kernel was not launched");
}

// What no thread writes while the kernel runs; the compiler may then move the load ahead of stores.
template <class P>
static __device__ __forceinline__ P read_only(const P* from) {
  static_assert(sizeof(P) == 16 || sizeof(P) == 8 || sizeof(P) == 4 || sizeof(P) == 2 || sizeof(P) == 1);
  if constexpr (sizeof(P) == 16) {
    return bit_cast<P>(__ldg(reinterpret_cast<const uint4*>(from)));
  } else if constexpr (sizeof(P) == 8) {
    return bit_cast<P>(__ldg(reinterpret_cast<const unsigned long long*>(from)));
  } else if constexpr (sizeof(P) == 4) {
    return bit_cast<P>(__ldg(reinterpret_cast<const unsigned int*>(from)));
  } else if constexpr (sizeof(P) == 2) {
    return bit_cast<P>(__ldg(reinterpret_cast<const unsigned short*>(from)));
  } else {
    return bit_cast<P>(__ldg(reinterpret_cast<const unsigned char*>(from)));
  }
}

}  // namespace lets::cuda

#else
#include "emulator.h"
#endif
