// Lists of tensors as Python holds them.
#pragma once

#include <pybind11/pybind11.h>

namespace lets {

// Adds to the module _C: reads_lists(), addresses(tensors), and the class Layout.
void bind_lists(pybind11::module_& m);

}  // namespace lets
