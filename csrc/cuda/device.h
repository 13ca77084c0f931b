// The device that a call runs on, and torch's current stream there.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../runs.h"
#include "kernels.h"

// Declared by torch only where it is built with CUDA, which a machine without a GPU need not have.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace lets::cuda {

class Device {
 public:
  // That of the first tensor there is; it is the current device as long as this object lives.
  Device(const Tensors& list, const Tensors& others)
      : where{true, anchor(list.empty() ? others : list).get_device_index()}, guard_(where.index) {
    select(where.index);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(where.index, &stream));
  }
  int32_t type() const { return aoti_torch_device_type_cuda(); }
  int32_t index() const { return where.index; }

  const Where where;
  void* stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace lets::cuda
