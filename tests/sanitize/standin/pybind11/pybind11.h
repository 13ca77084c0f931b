// The Python module of csrc/ops.cpp, without Python: it compiles, and nothing calls it.
#pragma once

namespace pybind11 {
struct arg {
  explicit arg(const char*) {}
};
struct Module {
  const char*& doc() { return text; }
  template <class... Anything>
  void def(const Anything&...) {}
  const char* text = nullptr;
};
}  // namespace pybind11

#define PYBIND11_MODULE(name, m) [[maybe_unused]] static void module_##name(pybind11::Module& m)
