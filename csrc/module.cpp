// The Python module _C, which holds the ops of ops.cpp as well.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "isa.h"
#include "lists.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels of lets_kernels; importing it registers torch.ops.lets_kernels.*";
  m.def("cpu_isa", &lets::cpu::current_isa, "The instruction set that the CPU kernels use.");
  m.def("supported_cpu_isas", &lets::cpu::supported_isas, "Built in and supported here, the best one last.");
  m.def("use_cpu_isa", &lets::cpu::use_isa, pybind11::arg("name"),
        "Use another supported instruction set; ValueError names the choices. Not while an op runs.");
  m.attr("WITHOUT_CUDA") = LETS_WITHOUT_CUDA;  // why there is no CUDA library beside this one, or empty
  m.attr("CUDA_ARCHITECTURES") = LETS_CUDA_ARCHITECTURES;
  lets::bind_lists(m);
}
