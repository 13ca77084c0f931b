// csrc/cuda/device.h for the emulator: CPU tensors, no streams.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "../../csrc/runs.h"

namespace lets::cuda {

struct Device {
  Device(const Tensors&, const Tensors&) {}
  int32_t type() const { return aoti_torch_device_type_cpu(); }
  int32_t index() const { return 0; }

  const Where where{};
  void* stream = nullptr;
};

}  // namespace lets::cuda
