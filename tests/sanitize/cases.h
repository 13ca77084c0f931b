// Random layouts and the lists of tensors over them, in every form that an op takes.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <random>

#include "../../csrc/layout.h"
#include "../../csrc/math.h"
#include "memory.h"
#include "standin/torch.h"

namespace sanitize {

using lets::Arithmetic;
using lets::Dtype;
using lets::Run;
using lets::with_type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Random = std::mt19937_64;

inline int64_t up_to(Random& random, int64_t most) { return std::uniform_int_distribution<int64_t>(0, most)(random); }
inline bool often(Random& random, int percent) { return up_to(random, 99) < percent; }
template <class T>
T one_of(Random& random, std::initializer_list<T> values) {
  return values.begin()[up_to(random, int64_t(values.size()) - 1)];
}

constexpr ScalarType scalar_type(Dtype dtype) {
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half};
  return types[int(dtype)];
}

// The runs of one call: what the run table holds, and how far past an aligned address each run of a list begins.
struct Layout {
  std::vector<Run> runs;
  std::vector<int64_t> offset;
  int64_t end = 0, filters = 0;  // elements of a flat buffer; filter norms
  Dtype dtype = Dtype::float32;
  bool element_wise = false;

  Tensor table() const {
    auto* data = const_cast<Run*>(runs.data());
    return Tensor(data, ScalarType::Long, {int64_t(runs.size()), lets::kColumns}, {lets::kColumns, 1});
  }
};

// `long_runs`: sizes about the chunk as it ships, not only about blocks, lanes and vectors.
inline Layout random_layout(Random& random, Dtype dtype, bool long_runs) {
  Layout layout;
  layout.dtype = dtype;
  const int64_t count = dtype == Dtype::float32 && often(random, 5) ? 0
                        : often(random, 10)                         ? 10 + up_to(random, 30)
                                                                    : 1 + up_to(random, 5);
  int64_t start = 16 * up_to(random, 3);
  for (int64_t i = 0; i < count; ++i) {
    int64_t length = one_of<int64_t>(random, {-2, -1, 0, 1}), filters = 0, numel = 0;
    if (length == 1) {  // filters divide their run: length * filters * repetitions
      const bool few = often(random, 15);
      length = few ? 1000 + up_to(random, 2000) : 1 + up_to(random, 20);
      filters = 1 + up_to(random, few ? 2 : 30);
      numel = length * filters * (1 + up_to(random, 2));
    } else if (long_runs && often(random, 15)) {
      numel = one_of<int64_t>(random, {65535, 65536, 65537, 70001, 131073});
    } else {
      numel = often(random, 60) ? one_of<int64_t>(random, {0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 65, 1023, 1024, 1025})
                                : up_to(random, 4000);
    }
    layout.element_wise = layout.element_wise || length == 0;
    layout.runs.push_back({start, numel, length, filters, length > 0 ? layout.filters : 0});
    layout.offset.push_back(often(random, 50) ? 0 : up_to(random, 17));
    layout.filters += filters;
    layout.end = start + numel;
    start += (numel + 15) / 16 * 16 + (often(random, 20) ? 16 * up_to(random, 2) : 0);
  }
  return layout;
}

enum class Form { list, flat, packed };
enum class Values { any, positive, unwritten };

// One list argument with its memory, and what the memory must hold after the op.
class List {
 public:
  List(Random& random, const Layout& layout, Form form, Values values, Dtype dtype) : dtype_(dtype) {
    const int64_t item = lets::size_of(dtype);
    if (form == Form::flat) {
      memory_.push_back(std::make_unique<Memory>(layout.end * item, item * up_to(random, 3)));
      for (const Run& run : layout.runs) add(random, *memory_[0], run.start * item, run.numel, values);
      tensors.emplace_back(memory_[0]->data(), scalar_type(dtype), std::vector{layout.end}, std::vector<int64_t>{1});
    } else {
      for (size_t i = 0; i < layout.runs.size(); ++i) {
        const int64_t numel = layout.runs[i].numel;
        memory_.push_back(std::make_unique<Memory>(numel * item, layout.offset[i] * item));
        add(random, *memory_[i], 0, numel, values);
        tensors.emplace_back(memory_[i]->data(), scalar_type(dtype), std::vector{numel}, std::vector<int64_t>{1});
      }
    }
    if (form == Form::packed) {
      addresses_ = {lets::kPacked[0], lets::kPacked[1], int64_t(dtype)};
      for (const Tensor& t : tensors) addresses_.push_back(reinterpret_cast<int64_t>(t.data_ptr()));
      const std::vector<int64_t> sizes{int64_t(addresses_.size())};
      tensors = {Tensor(addresses_.data(), ScalarType::Long, sizes, {1}), Tensor(&anchor_, ScalarType::Long, {}, {})};
    }
    for (auto& memory : memory_) memory->close();
  }
  List(const List&) = delete;

  // Run i as it must be after the op.
  template <class T>
  T* expected(size_t i) {
    return reinterpret_cast<T*>(expected_[i]);
  }
  void verify(const char* what) {
    for (auto& memory : memory_) memory->verify(what);
  }

  Tensors tensors;

 private:
  void add(Random& random, Memory& memory, int64_t at, int64_t numel, Values values) {
    char* to = memory.expected() + at;
    expected_.push_back(to);
    with_type(dtype_, [&](auto type) {
      using T = decltype(type);
      using C = Arithmetic<T>;
      std::uniform_real_distribution<double> uniform(values == Values::positive ? 0.01 : -2.0, 2.0);
      for (int64_t i = 0; i < numel && values != Values::unwritten; ++i)
        lets::narrow(i % 7 == 3 && values == Values::any ? C(0) : C(uniform(random)), reinterpret_cast<T*>(to)[i]);
    });
    memory.claim(at, numel * lets::size_of(dtype_));
  }

  Dtype dtype_;
  std::vector<std::unique_ptr<Memory>> memory_;
  std::vector<char*> expected_;
  std::vector<int64_t> addresses_;
  int64_t anchor_ = 0;
};

// One value between bands, as a 0-d tensor.
template <class T>
class Single {
 public:
  Single(ScalarType type, T value) : memory_(sizeof(T), 0), tensor(memory_.data(), type, {}, {}) {
    expected() = value;
    memory_.claim(0, sizeof(T));
    memory_.close();
  }
  T& expected() { return *reinterpret_cast<T*>(memory_.expected()); }
  void verify(const char* what) { memory_.verify(what); }

 private:
  Memory memory_;

 public:
  const Tensor tensor;
};
// Several values between bands, as a tensor of one dimension; one alone as a 0-d tensor.
template <class T>
class Several {
 public:
  Several(ScalarType type, const std::vector<T>& values)
      : memory_(int64_t(values.size() * sizeof(T)), 0),
        tensor(memory_.data(), type, values.size() == 1 ? Sizes{} : Sizes{int64_t(values.size())},
               values.size() == 1 ? Sizes{} : Sizes{1}) {
    std::copy(values.begin(), values.end(), expected());
    memory_.claim(0, int64_t(values.size() * sizeof(T)));
    memory_.close();
  }
  T* expected() { return reinterpret_cast<T*>(memory_.expected()); }
  void verify(const char* what) { memory_.verify(what); }

 private:
  using Sizes = std::vector<int64_t>;
  Memory memory_;

 public:
  const Tensor tensor;
};
// Numbers that differ by run, or one for all; `values` are those that there may be.
class PerRun {
 public:
  PerRun(Random& random, const Layout& layout, std::initializer_list<double> values)
      : list(often(random, 50) ? layout.runs.size() : 1) {
    for (double& number : list) number = one_of(random, values);
  }
  double at(size_t run) const { return list[list.size() == 1 ? 0 : run]; }

  std::vector<double> list;
};
// A mask of the bucket: bytes of 0 to 2 where runs are.
class Mask {
 public:
  Mask(Random& random, const Layout& layout)
      : memory_(layout.end, up_to(random, 3)), tensor(memory_.data(), ScalarType::Byte, {layout.end}, {1}) {
    for (const Run& run : layout.runs) {
      for (int64_t i = 0; i < run.numel; ++i) expected()[run.start + i] = uint8_t(up_to(random, 2));
      memory_.claim(run.start, run.numel);
    }
    memory_.close();
  }
  uint8_t* expected() { return reinterpret_cast<uint8_t*>(memory_.expected()); }
  void verify(const char* what) { memory_.verify(what); }

 private:
  Memory memory_;

 public:
  const Tensor tensor;
};
inline Single<double> number(double value) { return {ScalarType::Double, value}; }
inline Single<int64_t> flag(int64_t value) { return {ScalarType::Long, value}; }

}  // namespace sanitize
