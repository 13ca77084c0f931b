// Stands in for torch's stable ABI, as far as csrc/ uses it, so that csrc/ops.cpp runs unchanged under sanitizers.
//
// Torch itself cannot be built here with a sanitizer, and its threads (OpenMP) are opaque to ThreadSanitizer. A Tensor
// below owns nothing: what memory an op may touch is up to the test (memory.h).
#pragma once

#include <atomic>
#include <cstdint>
#include <latch>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <typeinfo>
#include <vector>

namespace standin {

// What STD_TORCH_CHECK throws: the op refused its arguments.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Words>
[[noreturn]] void refuse(const Words&... words) {
  std::ostringstream text;
  (text << ... << words);
  throw Refused(text.str());
}

// The ops as they were registered, by name; their C++ type is checked when one is asked for.
struct Op {
  void (*function)();
  const std::type_info* type;
  std::shared_ptr<std::atomic<bool>> asked = std::make_shared<std::atomic<bool>>(false);
};
inline std::map<std::string, Op>& ops() {
  static std::map<std::string, Op> all;
  return all;
}
struct Library {
  void def(const char*) {}
  void impl(const char* name, const Op& op) { ops()[name] = op; }
};
template <class F>
Op box(F* function) {
  return {reinterpret_cast<void (*)()>(function), &typeid(F), std::make_shared<std::atomic<bool>>(false)};
}
template <class F>
F* op(const char* name) {
  const Op& found = ops().at(name);
  found.asked->store(true, std::memory_order_relaxed);
  if (*found.type != typeid(F)) throw std::logic_error(std::string(name) + " has another C++ type");
  return reinterpret_cast<F*>(found.function);
}
// The names of the ops that nobody has asked for.
inline std::string left_out() {
  std::string names;
  for (const auto& [name, op] : ops())
    if (!op.asked->load()) names += (names.empty() ? "" : ", ") + name;
  return names;
}
struct Registration {
  explicit Registration(void (*define)(Library&)) {
    Library library;
    define(library);
  }
};

inline std::atomic<int> threads{1};

}  // namespace standin

#define STD_TORCH_CHECK(condition, ...) ((condition) ? void() : ::standin::refuse(__VA_ARGS__))
#define STABLE_TORCH_ERROR_CODE_CHECK(call) STD_TORCH_CHECK((call) == 0, "the call failed")
#define TORCH_BOX(function) ::standin::box(function)
#define STABLE_TORCH_LIBRARY(name, m)                                   \
  static void define_##name(standin::Library&);                         \
  static const standin::Registration registered_##name(&define_##name); \
  static void define_##name(standin::Library& m)
#define STABLE_TORCH_LIBRARY_IMPL(name, key, m)                                             \
  static void implement_##name##_##key(standin::Library&);                                  \
  static const standin::Registration implemented_##name##_##key(&implement_##name##_##key); \
  static void implement_##name##_##key(standin::Library& m)

namespace torch::headeronly {
enum class ScalarType { Float, Double, BFloat16, Half, Long, Int, Byte };
}

// A new scalar, or a new vector of doubles, that the op returns.
struct AtenTensorOpaque {
  std::shared_ptr<std::vector<double>> memory;
};
using AtenTensorHandle = AtenTensorOpaque*;
// What a tensor here points to is all there. Handles are new, and whoever gets one deletes it.
inline int aoti_torch_get_storage_offset(AtenTensorHandle handle, int64_t* offset) {
  delete handle;
  *offset = 0;
  return 0;
}
inline int aoti_torch_get_storage_size(AtenTensorHandle handle, int64_t* bytes) {
  delete handle;
  *bytes = INT64_MAX;
  return 0;
}

namespace torch::stable {

class Tensor {
 public:
  using ScalarType = headeronly::ScalarType;
  Tensor(void* data, ScalarType type, std::vector<int64_t> sizes, std::vector<int64_t> strides)
      : data_(data), type_(type), sizes_(std::move(sizes)), strides_(std::move(strides)) {}
  explicit Tensor(AtenTensorHandle handle) : type_(ScalarType::Double), owned_(handle->memory) {
    data_ = owned_->data();
    delete handle;
  }
  bool is_cpu() const { return true; }
  bool is_cuda() const { return false; }
  int32_t get_device_index() const { return -1; }
  ScalarType scalar_type() const { return type_; }
  int64_t dim() const { return int64_t(sizes_.size()); }
  int64_t size(int64_t d) const { return sizes_.at(size_t(d)); }
  const std::vector<int64_t>& sizes() const { return sizes_; }
  const std::vector<int64_t>& strides() const { return strides_; }
  int64_t numel() const {
    int64_t product = 1;
    for (int64_t size : sizes_) product *= size;
    return product;
  }
  size_t element_size() const {
    using enum headeronly::ScalarType;
    return type_ == Double || type_ == Long ? 8 : type_ == Float || type_ == Int ? 4 : type_ == Byte ? 1 : 2;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (size_t d = sizes_.size(); d-- > 0;) {
      if (sizes_[d] == 0) return true;
      if (sizes_[d] != 1 && strides_[d] != expected) return false;
      expected *= sizes_[d];
    }
    return true;
  }
  void* data_ptr() const { return data_; }
  void* mutable_data_ptr() const { return data_; }
  const void* const_data_ptr() const { return data_; }
  const std::shared_ptr<std::vector<double>>& memory() const { return owned_; }
  AtenTensorHandle get() const { return new AtenTensorOpaque{owned_}; }

 private:
  void* data_;
  ScalarType type_;
  std::vector<int64_t> sizes_, strides_;
  std::shared_ptr<std::vector<double>> owned_;
};

inline uint32_t get_num_threads() { return uint32_t(standin::threads.load(std::memory_order_relaxed)); }

// One thread an index, and the caller for the first: what torch's own pool does with a grain of one. All begin at once:
// otherwise the first would mostly be through before the last is there.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  std::vector<std::thread> others;
  if (begin >= end) return;
  std::latch start(end - begin);
  const auto one = [&](int64_t i) {
    start.arrive_and_wait();
    f(i, i + 1);
  };
  for (int64_t i = begin + 1; i < end; ++i) others.emplace_back([&one, i] { one(i); });
  one(begin);
  for (auto& thread : others) thread.join();
}

}  // namespace torch::stable

// ---- the C functions behind new tensors

inline int32_t aoti_torch_dtype_float64() { return 0; }
inline int32_t aoti_torch_device_type_cpu() { return 0; }
inline int aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t*, int32_t, int32_t, int32_t,
                                    AtenTensorHandle* to) {
  const size_t numel = dims == 0 ? 1 : size_t(sizes[0]);
  *to = new AtenTensorOpaque{std::make_shared<std::vector<double>>(numel)};
  return 0;
}
// A scalar over the first element; the memory stays that of the whole. Takes the handle that Tensor::get made.
inline int aoti_torch__reinterpret_tensor(AtenTensorHandle from, int64_t, const int64_t*, const int64_t*, int64_t,
                                          AtenTensorHandle* to) {
  *to = from;
  return 0;
}
