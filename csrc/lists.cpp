// Where the tensors of a list lie, read without a call of Python for each of them.
//
// What else a step asks of every tensor of a list (its gradient, its version, whether it is the one of the last step)
// is asked here through Python's own functions in C.
//
// A class of tensors may offer a table of functions in C for the exchange of tensors (DLPack 1, DLPackExchangeAPI), as
// torch.Tensor.__dlpack_c_exchange_api__. One of them describes a tensor and takes no hold of it. The table has a
// stable layout and needs none of torch's headers; where torch has none, reads_lists() says so.
#include "lists.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "layout.h"

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

PyObject* attribute(PyObject* of, PyObject* name) {
  PyObject* found = PyObject_GetAttr(of, name);
  if (found == nullptr) throw py::error_already_set();
  return found;
}

bool flag(PyObject* of, PyObject* name) {
  const auto found = py::reinterpret_steal<py::object>(attribute(of, name));
  return found.ptr() == Py_True;
}

// Names, which live as long as the process.
PyObject* const kGrad = PyUnicode_InternFromString("grad");
PyObject* const kRequiresGrad = PyUnicode_InternFromString("requires_grad");
PyObject* const kVersion = PyUnicode_InternFromString("_version");

// The class torch.Tensor itself, and its method is_neg.
PyObject* tensor_class() {
  static PyObject* const found = py::object(py::module_::import("torch").attr("Tensor")).release().ptr();
  return found;
}

// True for a lazily negated tensor, whose memory holds the numbers with the other sign.
bool is_negated(PyObject* tensor) {
  static PyObject* const is_neg =
      py::object(py::reinterpret_borrow<py::object>(tensor_class()).attr("is_neg")).release().ptr();
  const auto found = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg, tensor));
  if (!found) throw py::error_already_set();
  return found.ptr() == Py_True;
}

py::bytes as_bytes(const std::vector<int64_t>& numbers) {
  return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t)};
}

// Lists of addresses as tensors that the ops take (runs.h). Mostly they are those of the last step; a tensor that
// nobody else holds any more is written again where they are not.
class Words {
 public:
  // ``make`` gives the tensor of a dtype's number and of addresses in bytes.
  explicit Words(py::function make) : make_(std::move(make)) {}

  // None if an address is below ``least``: then a tensor may have no memory of its own.
  py::object of(int64_t number, const py::bytes& addresses, int64_t least) {
    const std::string_view bytes = addresses;
    const auto* at = reinterpret_cast<const int64_t*>(bytes.data());
    const size_t count = bytes.size() / sizeof(int64_t);
    for (size_t i = 0; i < count; ++i)
      if (at[i] < least) return py::none();
    Entry* unused = nullptr;
    for (Entry& e : entries_) {
      if (e.count != count || e.words[kPackedWords - 1] != number) continue;
      if (std::memcmp(e.words + kPackedWords, at, bytes.size()) == 0) return e.tensor;
      if (Py_REFCNT(e.tensor.ptr()) == 1) unused = &e;
    }
    if (unused == nullptr) {
      py::object made = make_(number, addresses);
      View v;
      if (!read(made.ptr(), v)) return made;
      if (entries_.size() == kMost) entries_.pop_front();
      entries_.push_back({made, reinterpret_cast<int64_t*>(address_of(v)), count});
      return made;
    }
    std::memcpy(unused->words + kPackedWords, at, bytes.size());
    return unused->tensor;
  }

 private:
  struct Entry {
    py::object tensor;
    int64_t* words;
    size_t count;
  };
  static constexpr size_t kMost = 128;
  py::function make_;
  std::deque<Entry> entries_;
};

// The gradients of the parameters that have one and are trained.
py::list gradients(const py::list& params) {
  py::list found;
  for (const py::handle p : params) {
    if (!flag(p.ptr(), kRequiresGrad)) continue;
    const auto g = py::reinterpret_steal<py::object>(attribute(p.ptr(), kGrad));
    if (!g.is_none()) found.append(g);
  }
  return found;
}

// Writes the version of each of these gradients into an attribute of it; false if one is of a class of its own.
bool mark_gradients(const py::list& params, const py::str& name) {
  for (const py::handle p : params) {
    if (!flag(p.ptr(), kRequiresGrad)) continue;
    const auto g = py::reinterpret_steal<py::object>(attribute(p.ptr(), kGrad));
    if (g.is_none()) continue;
    if (reinterpret_cast<PyObject*>(Py_TYPE(g.ptr())) != tensor_class()) return false;
    const auto version = py::reinterpret_steal<py::object>(attribute(g.ptr(), kVersion));
    if (PyObject_SetAttr(g.ptr(), name.ptr(), version.ptr()) != 0) throw py::error_already_set();
  }
  return true;
}

// True if these are the known tensors, in the known order, each trained or not as it was.
bool unchanged(const py::list& tensors, const py::list& known, const py::list& trained) {
  if (tensors.size() != known.size()) return false;
  for (size_t i = 0; i < known.size(); ++i) {
    const auto at = Py_ssize_t(i);
    PyObject* t = PyList_GET_ITEM(tensors.ptr(), at);
    if (t != PyList_GET_ITEM(known.ptr(), at)) return false;
    if (flag(t, kRequiresGrad) != (PyList_GET_ITEM(trained.ptr(), at) == Py_True)) return false;
  }
  return true;
}

// True if the entries of a state hold these objects under a name, in their order; None stands for one that is missing.
bool holds(const py::dict& state, const py::str& name, const py::list& known) {
  if (state.size() != known.size()) return false;
  Py_ssize_t place = 0, i = 0;
  PyObject *key, *entry;
  while (PyDict_Next(state.ptr(), &place, &key, &entry)) {
    if (!PyDict_Check(entry)) return false;
    PyObject* found = PyDict_GetItemWithError(entry, name.ptr());
    if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
    if ((found == nullptr ? Py_None : found) != PyList_GET_ITEM(known.ptr(), i++)) return false;
  }
  return true;
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

  // The gradients of parameters, and their addresses; no addresses if one is missing, lies otherwise, or is negated.
  std::pair<py::list, std::optional<py::bytes>> gradients(const py::list& params) const {
    py::list grads(params.size());
    std::vector<int64_t> found(numels_.size());
    bool lie = params.size() == found.size();
    for (size_t i = 0; i < params.size(); ++i) {
      PyObject* g = attribute(PyList_GET_ITEM(params.ptr(), Py_ssize_t(i)), kGrad);
      PyList_SET_ITEM(grads.ptr(), Py_ssize_t(i), g);
      View v;
      lie = lie && g != Py_None && read(g, v) && fits(v, i) && !is_negated(g);
      if (lie) found[i] = address_of(v);
    }
    if (!lie) return {grads, std::nullopt};
    return {grads, as_bytes(found)};
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
  m.def("gradients", &gradients, py::arg("params"), "The gradients of the parameters that have one and are trained.");
  m.def("mark_gradients", &mark_gradients, py::arg("params"), py::arg("name"),
        "Write the version of each of `gradients` into an attribute of it; False if one is no plain torch.Tensor.");
  m.def("unchanged", &unchanged, py::arg("tensors"), py::arg("known"), py::arg("trained"),
        "Whether these are the known tensors, each with the `requires_grad` of old.");
  m.def("holds", &holds, py::arg("state"), py::arg("name"), py::arg("known"),
        "Whether the entries of a state hold these objects under a name; None stands for one that is missing.");
  py::class_<Words>(m, "Words", "Lists of addresses as tensors, which are written again once nobody holds them.")
      .def(py::init<py::function>(), py::arg("make"))
      .def("of", &Words::of, py::arg("number"), py::arg("addresses"), py::arg("least"),
           "The tensor of a dtype's number and of addresses in bytes; None if an address is below `least`.");
  py::class_<Layout>(m, "Layout", "The strides, numbers of elements, dtype and device of tensors.")
      .def(py::init<const py::list&>(), py::arg("tensors"))
      .def("addresses", &Layout::addresses, py::arg("tensors"),
           "The addresses of other tensors as int64 in bytes; None if one of them lies otherwise.")
      .def("gradients", &Layout::gradients, py::arg("params"),
           "The gradients of parameters, and their addresses; None for these if one does not lie so, or is negated.");
}

}  // namespace lets
