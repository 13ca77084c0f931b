// Lists of tensors, as they come from Python, turned into checked runs and chunks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <type_traits>
#include <vector>

#include "layout.h"
#include "random.h"

#include <declared.h>  // made by generate.py, of what stands above

// What torch before 2.13 calls otherwise.
#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace lets {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// The device that all tensors of a call must be on.
struct Where {
  bool cuda = false;
  int32_t index = -1;
  bool has(const Tensor& t) const { return cuda ? t.is_cuda() && t.get_device_index() == index : t.is_cpu(); }
  const char* name() const { return cuda ? "the CUDA device of the rest" : "the CPU"; }
};

inline Dtype dtype_of(const Tensor& t, const char* what) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      STD_TORCH_CHECK(false, what, " must be float32, float64, bfloat16 or float16");
  }
}

// True if the elements fill one stretch of memory without holes or overlaps, in whatever order of dimensions.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  std::vector<bool> used(sizes.size(), false);
  int64_t expected = 1;
  for (size_t found = 0; found < sizes.size(); ++found) {
    size_t next = sizes.size();
    for (size_t d = 0; d < sizes.size(); ++d)
      if (!used[d] && (sizes[d] == 1 || strides[d] == expected)) next = d;
    if (next == sizes.size()) return false;
    used[next] = true;
    expected *= sizes[next];
  }
  return true;
}

// The address of a dense tensor's first element. Its memory may have been given back since (FSDP, resize_(0)).
inline void* memory_of(const Tensor& t, const char* what) {
  int64_t offset = 0, bytes = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  void* at = t.data_ptr();
  const bool fits = at != nullptr && t.numel() <= bytes / int64_t(t.element_size()) - offset;
  STD_TORCH_CHECK(t.numel() == 0 || fits, what, " has no memory of its own");
  return at;
}

// The run table: a view of the int64 CPU tensor [n, 5].
class Table {
 public:
  explicit Table(const Tensor& t) : tensor_(t) {
    STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.size(1) == kColumns && t.is_contiguous() &&
                        t.scalar_type() == torch::headeronly::ScalarType::Long,
                    "the run table must be a contiguous int64 CPU tensor of shape [n, ", kColumns, "]");
    runs_ = static_cast<const Run*>(memory_of(t, "the run table"));
    size_ = t.size(0);
    for (int64_t i = 0; i < size_; ++i) {
      const Run& run = runs_[i];
      STD_TORCH_CHECK(within(run.start) && within(run.numel) && run.filter_length >= kFisher, "run table: row ", i,
                      " is not valid");
      if (run.filter_length > 0) {
        STD_TORCH_CHECK(within(run.filter_count) && run.filter_count >= 1 && within(run.filter_start) &&
                            run.filter_length <= kMost / run.filter_count && run.numel % run.filter_length == 0 &&
                            run.numel / run.filter_length % run.filter_count == 0,
                        "run table: the filters of row ", i, " do not divide it");
      }
      total_ += run.numel;
      STD_TORCH_CHECK(within(total_), "run table: more elements than any memory holds");
      if (run.start + run.numel > end_) end_ = run.start + run.numel;
      adaptive_ = adaptive_ || run.filter_length == kElementWise;
      if (run.filter_length > 0 && run.filter_start + run.filter_count > filters_)
        filters_ = run.filter_start + run.filter_count;
    }
  }
  int64_t size() const { return size_; }
  const Run& operator[](int64_t i) const { return runs_[i]; }
  int64_t total() const { return total_; }         // elements in all runs
  int64_t end() const { return end_; }             // elements a flat buffer must have
  int64_t filters() const { return filters_; }     // filter norms needed; 0: no filters
  bool element_wise() const { return adaptive_; }  // some run has T = |theta| + xi

  std::vector<Chunk> chunks() const {
    std::vector<Chunk> all;
    all.reserve(size_t(total_ / kChunk + size_));
    for (int64_t i = 0; i < size_; ++i)
      for (int64_t b = 0; b < runs_[i].numel; b += kChunk)
        all.push_back({i, b, runs_[i].numel - b < kChunk ? runs_[i].numel - b : kChunk});
    return all;
  }

 private:
  // Beyond any memory, and far enough from 2^63 that no sum of two such numbers, in bytes, overflows.
  static constexpr int64_t kMost = int64_t(1) << 56;
  static bool within(int64_t n) { return n >= 0 && n <= kMost; }

  Tensor tensor_;
  const Run* runs_;
  int64_t size_ = 0, total_ = 0, end_ = 0, filters_ = 0;
  bool adaptive_ = false;
};

// A list may stand as two tensors: an int64 one on the CPU with two words that no other tensor has, the number of a
// dtype and the addresses of its tensors; and an anchor, any int64 scalar on their device. Looking at a hundred tensors
// one by one takes longer than most ops.
inline bool is_packed(const Tensors& list) {
  if (list.size() != 2 || list[0].scalar_type() != torch::headeronly::ScalarType::Long || list[0].dim() != 1 ||
      !list[0].is_cpu() || !list[0].is_contiguous() || list[0].numel() < kPackedWords)
    return false;
  const auto* words = static_cast<const int64_t*>(memory_of(list[0], "a list's first tensor"));
  return words[0] == kPacked[0] && words[1] == kPacked[1];
}
inline const Tensor& anchor(const Tensors& list) { return is_packed(list) ? list[1] : list.at(0); }

// Whether an op can do without a list that has runs.
enum class Need { required, optional };

// The addresses of one list argument: one tensor a run, or one flat buffer addressed by Run::start, or nothing.
class Runs {
 public:
  Runs(const Tensors& list, const Table& table, Dtype dtype, Where where, const char* what, Need need = Need::required)
      : item_(size_of(dtype)) {
    if (list.empty()) {
      STD_TORCH_CHECK(need == Need::optional || table.total() == 0, what,
                      " is empty; pass one tensor for each row of the run table, or one flat buffer");
      return;
    }
    if (is_packed(list)) {
      unpack(list, table, dtype, where, what);
      return;
    }
    const bool flat = list.size() == 1 && (table.size() != 1 || list[0].numel() != table[0].numel);
    STD_TORCH_CHECK(flat || int64_t(list.size()) == table.size(), what, ": ", list.size(), " tensors for ",
                    table.size(), " rows of the run table");
    address_.reserve(size_t(table.size()));
    for (size_t i = 0; i < list.size(); ++i) {
      const Tensor& t = list[i];
      STD_TORCH_CHECK(where.has(t), what, "[", i, "] is not on ", where.name());
      STD_TORCH_CHECK(dtype_of(t, what) == dtype, what, "[", i, "] has another dtype than the rest");
      STD_TORCH_CHECK(is_dense(t), what, "[", i, "] has holes or overlaps in memory; pass a contiguous copy");
      STD_TORCH_CHECK(flat ? t.numel() >= table.end() : t.numel() == table[int64_t(i)].numel, what, "[", i,
                      "] has not the number of elements that the run table says");
      auto* at = static_cast<char*>(memory_of(t, what));
      if (!flat) address_.push_back(at);
    }
    if (flat) {
      auto* base = static_cast<char*>(list[0].data_ptr());
      for (int64_t i = 0; i < table.size(); ++i) address_.push_back(base + table[i].start * item_);
    }
  }
  // The chunk's first element; null for an empty list.
  char* at(const Chunk& chunk) const {
    return address_.empty() ? nullptr : address_[size_t(chunk.run)] + chunk.begin * item_;
  }
  char* run(int64_t i) const { return address_.empty() ? nullptr : address_[size_t(i)]; }
  bool empty() const { return address_.empty(); }

 private:
  void unpack(const Tensors& list, const Table& table, Dtype dtype, Where where, const char* what) {
    const Tensor& t = list[0];
    STD_TORCH_CHECK(t.numel() == table.size() + kPackedWords && where.has(list[1]), what,
                    ": packed for another run table, or another device");
    const auto* at = static_cast<const int64_t*>(t.const_data_ptr()) + kPackedWords;
    STD_TORCH_CHECK(at[-1] == int64_t(dtype), what, " has another dtype than the rest");
    address_.reserve(size_t(table.size()));
    for (int64_t i = 0; i < table.size(); ++i) address_.push_back(reinterpret_cast<char*>(at[i]));
  }

  int64_t item_;
  std::vector<char*> address_;
};

// A number that differs by run, or is one for all.
class PerRun {
 public:
  PerRun(const std::vector<double>& given, const Table& table, const char* what)
      : given_(given), step_(given.size() == 1 ? 0 : 1) {
    STD_TORCH_CHECK(step_ == 0 || int64_t(given.size()) == table.size(), what,
                    " must be one number, or one for each row of the run table, not ", given.size());
  }
  double at(int64_t run) const { return given_[size_t(step_ * run)]; }

 private:
  const std::vector<double>& given_;
  int64_t step_;
};

// The same on the device.
class Radii {
 public:
  Radii(const Tensor& t, const Table& table, Where where, const char* what) : step_(t.numel() == 1 ? 0 : 1) {
    STD_TORCH_CHECK(where.has(t) && (step_ == 0 || t.numel() == table.size()) && t.is_contiguous() &&
                        t.scalar_type() == torch::headeronly::ScalarType::Double,
                    what, " must be a float64 tensor with one element, or one for each row of the run table, on ",
                    where.name());
    numbers_ = static_cast<const double*>(memory_of(t, what));
  }
  const double* at(int64_t run) const { return numbers_ + step_ * run; }

 private:
  const double* numbers_;
  int64_t step_;
};

// The part of T that a table and its filter norms describe.
class Scalings {
 public:
  Scalings(const Table& table, const Tensors& params, const std::optional<Tensor>& norms, Dtype dtype, const PerRun& xi,
           Where where)
      : Scalings(table, norms, dtype, where) {
    xi_ = &xi;
    check_given();
    STD_TORCH_CHECK(!table.element_wise() || !params.empty(), "params must be given where T = |theta| + xi");
  }
  // For ops that look at filters alone, if they are given, and for the op that writes their norms: one number a filter,
  // float (double for float64).
  Scalings(const Table& table, const std::optional<Tensor>& norms, Dtype dtype, Where where,
           const char* what = "filter_norms")
      : table_(table), item_(dtype == Dtype::float64 ? 8 : 4) {
    using torch::headeronly::ScalarType;
    if (table.filters() == 0 || !norms.has_value()) return;
    STD_TORCH_CHECK(where.has(*norms) && norms->is_contiguous() && norms->numel() >= table.filters() &&
                        norms->scalar_type() == (dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float),
                    what, " must hold one float32 (float64 for float64 parameters) a filter, on ", where.name());
    norms_ = static_cast<char*>(memory_of(*norms, what));
  }
  void check_given() const {
    STD_TORCH_CHECK(table_.filters() == 0 || norms_, "filter_norms must be given where the run table has filters");
  }
  Scaling at(const Chunk& chunk) const {
    const Run& run = table_[chunk.run];
    const char* norms = run.filter_length > 0 && norms_ ? norms_ + run.filter_start * item_ : nullptr;
    return {run.filter_length, run.filter_count, norms, xi_ ? xi_->at(chunk.run) : 0, chunk.begin};
  }

 private:
  const Table& table_;
  const PerRun* xi_ = nullptr;
  int64_t item_;
  const char* norms_ = nullptr;
};

// The address of a scalar argument, a tensor with one element, or of two numbers that stand side by side.
template <class Number, int64_t Count = 1>
Number* element(const Tensor& t, Where where, const char* what) {
  using torch::headeronly::ScalarType;
  constexpr bool is_double = std::is_same_v<Number, double>, is_float = std::is_same_v<Number, float>;
  constexpr auto type = is_double ? ScalarType::Double : is_float ? ScalarType::Float : ScalarType::Long;
  STD_TORCH_CHECK(where.has(t) && t.numel() == Count && (Count == 1 || t.is_contiguous()) && t.scalar_type() == type,
                  what, " must be a ",
                  is_double  ? "float64"
                  : is_float ? "float32"
                             : "int64",
                  " tensor with ", Count == 1 ? "one element" : "two elements", " on ", where.name());
  return static_cast<Number*>(memory_of(t, what));
}
template <class Number>
std::vector<Number*> element_of_each(const Tensors& list, Where where, const char* what) {
  std::vector<Number*> found;
  for (const Tensor& t : list) found.push_back(element<Number>(t, where, what));
  return found;
}
// A mask of the bucket: one byte an element, addressed by Run::start.
inline uint8_t* mask_of(const Tensor& t, const Table& table, Where where) {
  STD_TORCH_CHECK(where.has(t) && t.is_contiguous() && t.numel() >= table.end() &&
                      t.scalar_type() == torch::headeronly::ScalarType::Byte,
                  "mask must be a flat uint8 tensor with one element for each of the bucket, on ", where.name());
  return static_cast<uint8_t*>(memory_of(t, "mask"));
}
inline void check_mask_value(int64_t value, int64_t least, const char* what) {
  STD_TORCH_CHECK(value >= least && value <= 255, what, " must be of ", least, " to 255, not ", value);
}
inline std::vector<float*> step_counts(const Tensors& steps, const Table& table, Where where) {
  if (!is_packed(steps)) {
    STD_TORCH_CHECK(int64_t(steps.size()) == table.size(), "steps must hold one tensor a run");
    return element_of_each<float>(steps, where, "each of steps");
  }
  const Runs packed(steps, table, Dtype::float32, where, "steps");
  std::vector<float*> found;
  for (int64_t i = 0; i < table.size(); ++i) found.push_back(reinterpret_cast<float*>(packed.run(i)));
  return found;
}

// An op on no runs at all has no dtype to look at; any will do.
inline Dtype dtype_of_list(const Tensors& list, const char* what) {
  if (list.empty()) return Dtype::float32;
  if (!is_packed(list)) return dtype_of(list[0], what);
  const int64_t number = static_cast<const int64_t*>(list[0].const_data_ptr())[kPackedWords - 1];
  STD_TORCH_CHECK(number >= 0 && number <= int64_t(Dtype::float16), what, ": packed with an unknown dtype");
  return Dtype(number);
}

// A new float64 tensor: of one number with no dimensions, or of several with one.
inline Tensor empty_numbers(int64_t numel, int32_t device_type, int32_t device_index) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(numel > 1, &numel, &stride, aoti_torch_dtype_float64(),
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

// Calls f(i) for 0 <= i < count on torch's threads; each i writes only what is its own.
template <class F>
void for_each(int64_t count, int64_t elements, const F& f) {
  if (count <= 1 || elements < kWorthAThread) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, int64_t(torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
    // Relaxed: each i is taken once, and nothing else is promised, so a race of two of them shows as one.
    auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
    for (int64_t i = take(); i < count; i = take()) f(i);
  });
}

}  // namespace lets
