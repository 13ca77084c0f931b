// Where the tensors of a list lie, read without a call of Python for each of them.
//
// A class of tensors may offer a table of functions in C for the exchange of tensors (DLPack 1, DLPackExchangeAPI), as
// torch.Tensor.__dlpack_c_exchange_api__. One of them describes a tensor and takes no hold of it. The table has a
// stable layout and needs none of torch's headers; where torch has none, reads_lists() says so.
#include "lists.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace lets {
namespace {

namespace py = pybind11;

// What dlpack.h calls DLTensor, DLPackExchangeAPIHeader and DLPackExchangeAPI.
struct View {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct Exchange {
  uint32_t major, minor;
  void* previous;
  void *allocate, *from_python, *to_python;
  int (*view)(void* tensor, View* out);  // 0, or -1 with a Python exception
  void* stream;
};

const Exchange* find_exchange() {
  try {
    const py::object table = py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
    const auto* found = static_cast<const Exchange*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
    if (found != nullptr && found->major == 1 && found->view != nullptr) return found;
    PyErr_Clear();
  } catch (const py::error_already_set&) {  // this torch has no such table
  }
  return nullptr;
}

const Exchange* exchange() {
  static const Exchange* const found = find_exchange();
  return found;
}

// False for anything that is no tensor, or one without memory of its own: sparse, fake, on the meta device.
bool read(PyObject* tensor, View& out) {
  if (exchange()->view(tensor, &out) == 0) return true;
  PyErr_Clear();
  return false;
}

int64_t numel_of(const View& v) {
  int64_t n = 1;
  for (int32_t d = 0; d < v.ndim; ++d) n *= v.shape[d];
  return n;
}

int64_t address_of(const View& v) { return int64_t(reinterpret_cast<uintptr_t>(v.data) + v.byte_offset); }

py::bytes as_bytes(const std::vector<int64_t>& numbers) {
  return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t)};
}

// The addresses as int64, or None if there is a tensor that has none, or one below ``least`` although it has elements.
std::optional<py::bytes> addresses(const py::list& tensors, int64_t least) {
  std::vector<int64_t> found;
  found.reserve(tensors.size());
  for (const py::handle t : tensors) {
    View v;
    if (!read(t.ptr(), v)) return std::nullopt;
    found.push_back(address_of(v));
    if (found.back() < least && numel_of(v) != 0) return std::nullopt;
  }
  return as_bytes(found);
}

// The strides, numbers of elements, dtype and device of some tensors.
class Layout {
 public:
  explicit Layout(const py::list& tensors) {
    View v{};
    for (const py::handle t : tensors) {
      if (!read(t.ptr(), v)) throw py::value_error("a tensor without memory of its own has no layout");
      first_.push_back(strides_.size());
      strides_.insert(strides_.end(), v.strides, v.strides + v.ndim);
      numels_.push_back(numel_of(v));
    }
    first_.push_back(strides_.size());
    kind_ = v;
  }

  // The addresses of other tensors as int64, or None if one of them lies otherwise.
  std::optional<py::bytes> addresses(const py::list& tensors) const {
    if (tensors.size() != numels_.size()) return std::nullopt;
    std::vector<int64_t> found(numels_.size());
    for (size_t i = 0; i < found.size(); ++i) {
      View v;
      if (!read(PyList_GET_ITEM(tensors.ptr(), Py_ssize_t(i)), v) || !fits(v, i)) return std::nullopt;
      found[i] = address_of(v);
    }
    return as_bytes(found);
  }

 private:
  bool fits(const View& v, size_t i) const {
    if (size_t(v.ndim) != first_[i + 1] - first_[i] || numel_of(v) != numels_[i]) return false;
    if (v.code != kind_.code || v.bits != kind_.bits || v.lanes != kind_.lanes) return false;
    if (v.device_type != kind_.device_type || v.device_id != kind_.device_id) return false;
    for (int32_t d = 0; d < v.ndim; ++d)
      if (v.strides[d] != strides_[first_[i] + size_t(d)]) return false;
    return true;
  }

  std::vector<int64_t> strides_, numels_;
  std::vector<size_t> first_;  // the place of each tensor's strides, and the end
  View kind_{};                // one of them, for dtype and device
};

}  // namespace

void bind_lists(py::module_& m) {
  m.def("reads_lists", [] { return exchange() != nullptr; }, "Whether this torch lets lists of tensors be read.");
  m.def("addresses", &addresses, py::arg("tensors"), py::arg("least"),
        "The addresses as int64 in bytes; None if a tensor has none, or one below `least` although it has elements.");
  py::class_<Layout>(m, "Layout", "The strides, numbers of elements, dtype and device of tensors.")
      .def(py::init<const py::list&>(), py::arg("tensors"))
      .def("addresses", &Layout::addresses, py::arg("tensors"),
           "The addresses of other tensors as int64 in bytes; None if one of them lies otherwise.");
}

}  // namespace lets
