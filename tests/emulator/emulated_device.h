// csrc/cuda/device.h for the emulator: CPU tensors, no streams.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <string_view>

#include "../../csrc/cuda/batch.h"
#include "../../csrc/runs.h"

namespace lets::cuda {

struct Device {
  Device(const Tensors&, const Tensors&) {}
  int32_t type() const { return aoti_torch_device_type_cpu(); }
  int32_t index() const { return 0; }

  const Where where{};
  void* stream = nullptr;
};

// For tests/support/emulated.py: the launches since the library was loaded; the rows that one launch of an op takes,
// and those of a short one.
extern "C" int64_t lets_emulated_launches() { return Emulator::instance().launches(); }
extern "C" int64_t lets_emulated_rows(const char* op) {
#define LETS_ROWS(name, result) \
  if (op == std::string_view(#name)) return kMany<launch_of::name::Each>;
  LETS_OPS(LETS_ROWS)
#undef LETS_ROWS
  return 0;
}
extern "C" int64_t lets_emulated_few_rows() { return kFew; }

}  // namespace lets::cuda
