// Arguments of an op as a stretch of bytes says: tables, lists and scalars, most of which fit, and some of which do
// not.
//
// The addresses of a packed list cannot be checked, nor what is there: only an honest table gets one, of dense tensors
// of the dtype that it names.
#pragma once

#include <algorithm>

#include "cases.h"

namespace sanitize {

// The input, read from the front; zeros once it is used up.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  template <class T = uint8_t>
  T take() {
    T value{};
    const size_t n = std::min(left_, sizeof(T));
    std::memcpy(&value, data_, n);
    data_ += n, left_ -= n;
    return value;
  }
  int64_t up_to(int64_t most) { return int64_t(take<uint16_t>()) % (most + 1); }
  bool seldom() { return take() >= 0xf0; }

 private:
  const uint8_t* data_;
  size_t left_;
};

constexpr int64_t kExtreme[] = {0,
                                1,
                                -1,
                                -3,
                                15,
                                int64_t(1) << 31,
                                (int64_t(1) << 31) - 1,
                                int64_t(1) << 32,
                                int64_t(1) << 61,
                                int64_t(1) << 62,
                                INT64_MAX,
                                INT64_MAX - 15,
                                INT64_MIN};

inline int64_t any(Bytes& bytes) {
  const uint8_t kind = bytes.take();
  return kind < 0xc0 ? kExtreme[kind % std::size(kExtreme)] : bytes.take<int64_t>();
}

constexpr int64_t kMostElements = 512;  // that a list of the fuzzer holds in one tensor

// Rows that mean something, some fields replaced by any number.
struct Rows {
  explicit Rows(Bytes& bytes) {
    const int64_t count = bytes.up_to(6);
    int64_t start = 16 * bytes.up_to(2), first = 0;
    for (int64_t i = 0; i < count; ++i) {
      Run run{start, 0, bytes.up_to(3) - 2, 0, 0};
      if (run.filter_length == 1) {
        run.filter_length = 1 + bytes.up_to(9), run.filter_count = 1 + bytes.up_to(6), run.filter_start = first;
        run.numel = run.filter_length * run.filter_count * bytes.up_to(3);
        first += run.filter_count;
      } else {
        run.numel = bytes.up_to(200);
      }
      start += (run.numel + 15) / 16 * 16;
      for (int64_t* field : {&run.start, &run.numel, &run.filter_length, &run.filter_count, &run.filter_start}) {
        if (!bytes.seldom()) continue;
        *field = any(bytes);
        honest = false;
      }
      runs.push_back(run);
    }
    if (bytes.seldom() && count > 0) {  // sums of many rows
      runs.insert(runs.end(), 200, runs.back());
      honest = false;
    }
    end = start, norms = first;
  }
  std::vector<Run> runs;
  int64_t end, norms;
  bool honest = true;
};

// Memory and a tensor over it, or the list forms of them, as the bytes say: most fit the table, some do not.
class Given {
 public:
  explicit Given(Bytes& bytes) : bytes_(bytes), dtype_(Dtype(bytes.take() % 4)) {}

  Dtype dtype() { return bytes_.seldom() ? Dtype(bytes_.take() % 4) : dtype_; }
  Tensor vector(Dtype dtype, int64_t numel) {
    if (bytes_.seldom()) numel = bytes_.up_to(kMostElements);
    numel = std::clamp<int64_t>(numel, 0, 2 * kMostElements);
    std::vector<int64_t> sizes{numel}, strides{1};
    int64_t rows = 1, columns = numel, pitch = numel;
    if (bytes_.seldom()) {  // two dimensions, dense or with holes, in either order
      columns = 1 + bytes_.up_to(4), rows = numel / columns, pitch = columns + bytes_.up_to(1);
      sizes = {rows, columns}, strides = {pitch, 1};
      if (bytes_.take() & 1) std::swap(sizes[0], sizes[1]), std::swap(strides[0], strides[1]);
    }
    const int64_t item = lets::size_of(dtype), span = rows * pitch;
    memory_.push_back(std::make_unique<Memory>(span * item, bytes_.up_to(4) * item));
    Memory& memory = *memory_.back();
    const uint8_t value = bytes_.take();
    for (int64_t row = 0; row < rows; ++row) {
      std::memset(memory.expected() + row * pitch * item, value, size_t(columns * item));
      memory.claim(row * pitch * item, columns * item);
    }
    memory.close();
    return Tensor(memory.data(), scalar_type(dtype), sizes, strides);
  }
  Tensors list(const Rows& rows, bool may_be_missing = false) {
    Tensors tensors;
    const Dtype type = dtype();
    const int64_t form = bytes_.up_to(9);
    if (bytes_.seldom() || (may_be_missing && bytes_.take() % 2 == 0)) return tensors;
    if (form < 4) return {vector(type, rows.end + bytes_.up_to(2))};
    for (const Run& run : rows.runs) tensors.push_back(vector(type, run.numel));
    if (bytes_.seldom() && !tensors.empty()) tensors.pop_back();
    const bool fits =
        rows.honest && tensors.size() == rows.runs.size() &&
        std::equal(tensors.begin(), tensors.end(), rows.runs.begin(),
                   [](const Tensor& t, const Run& run) { return t.dim() == 1 && t.numel() == run.numel; });
    if (form > 6 && fits) return packed(tensors, type);
    return tensors;
  }
  template <class T>
  Tensor scalar(ScalarType type, T value) {
    if (bytes_.seldom()) return vector(dtype(), bytes_.up_to(2));
    memory_.push_back(std::make_unique<Memory>(sizeof(T), 0));
    std::memcpy(memory_.back()->expected(), &value, sizeof(T));
    memory_.back()->claim(0, sizeof(T));
    memory_.back()->close();
    return Tensor(memory_.back()->data(), type, {}, {});
  }
  template <class T>
  Tensor two(ScalarType type, T first, T second) {
    if (bytes_.seldom()) return scalar(type, first);
    const T values[] = {first, second};
    memory_.push_back(std::make_unique<Memory>(sizeof(values), 0));
    std::memcpy(memory_.back()->expected(), values, sizeof(values));
    memory_.back()->claim(0, sizeof(values));
    memory_.back()->close();
    return Tensor(memory_.back()->data(), type, {2}, {1});
  }
  Tensor mask(const Rows& rows) {
    if (bytes_.seldom()) return vector(dtype(), rows.end);
    const int64_t numel =
        std::clamp<int64_t>(bytes_.seldom() ? bytes_.up_to(kMostElements) : rows.end, 0, 2 * kMostElements);
    memory_.push_back(std::make_unique<Memory>(numel, bytes_.up_to(4)));
    std::memset(memory_.back()->expected(), bytes_.take() % 2, size_t(numel));
    memory_.back()->claim(0, numel);
    memory_.back()->close();
    return Tensor(memory_.back()->data(), ScalarType::Byte, {numel}, {1});
  }
  // One number a run, or one more.
  Tensors numbers(const Rows& rows, ScalarType type) {
    Tensors found;
    for (size_t i = rows.runs.size() + bytes_.seldom(); i > 0; --i)
      found.push_back(type == ScalarType::Float ? scalar(type, 1.0f) : scalar(type, 1.0));
    return found;
  }
  // One number, or one for each of the table's rows; seldom of another count, which an op must refuse.
  std::vector<double> by_run(double value) {
    const int64_t count = bytes_.seldom() ? bytes_.up_to(8) : bytes_.take() % 2 ? rows_ : 1;
    counts_fit_ = counts_fit_ && (count == 1 || count == rows_);
    return std::vector<double>(size_t(count), value);
  }
  // The same on the device.
  Tensor radii() {
    const bool one = bytes_.take() % 2;
    const Tensor numbers = one ? scalar(ScalarType::Double, 0.5) : vector(Dtype::float64, rows_);
    counts_fit_ = counts_fit_ && (numbers.numel() == 1 || numbers.numel() == rows_);
    return numbers;
  }
  // Whether all of those were of a count that fits.
  bool counts_fit() const { return counts_fit_; }
  Tensor table(Rows& rows) {
    const Tensor made = any_table(rows);
    rows_ = made.size(0);
    return made;
  }
  std::optional<Tensor> norms(const Rows& rows) {
    if (bytes_.seldom()) return std::nullopt;
    return vector(bytes_.seldom()            ? dtype()
                  : dtype_ == Dtype::float64 ? Dtype::float64
                                             : Dtype::float32,
                  rows.norms + bytes_.up_to(2));
  }
  // No byte outside what was claimed has changed.
  void verify() {
    for (auto& memory : memory_) {
      memory->open();
      memory->accept();
      memory->verify("fuzz");
    }
  }

 private:
  Tensor any_table(Rows& rows) {
    auto* data = rows.runs.data();
    const int64_t count = int64_t(rows.runs.size());
    if (!bytes_.seldom()) return Tensor(data, ScalarType::Long, {count, lets::kColumns}, {lets::kColumns, 1});
    switch (bytes_.take() % 4) {
      case 0:
        return Tensor(data, ScalarType::Long, {count * lets::kColumns}, {1});
      case 1:
        return Tensor(data, ScalarType::Double, {count, lets::kColumns}, {lets::kColumns, 1});
      case 2:
        return Tensor(data, ScalarType::Long, {lets::kColumns, count}, {1, lets::kColumns});
      default:
        return Tensor(data, ScalarType::Long, {count / 2, lets::kColumns}, {2 * lets::kColumns, 1});
    }
  }
  Tensors packed(const Tensors& tensors, Dtype type) {
    auto addresses = std::make_unique<std::vector<int64_t>>();
    const int64_t number = bytes_.seldom() ? any(bytes_) : int64_t(type);
    *addresses = {lets::kPacked[0], lets::kPacked[1], number >= 0 && number < 4 ? int64_t(type) : number};
    if (bytes_.seldom()) addresses->at(size_t(any(bytes_) & 1)) ^= 1;  // a list of two int64 vectors, which none may be
    for (const Tensor& t : tensors) addresses->push_back(reinterpret_cast<int64_t>(t.data_ptr()));
    if (bytes_.seldom()) addresses->pop_back();
    addresses->shrink_to_fit();
    addresses_.push_back(std::move(addresses));
    auto& all = *addresses_.back();
    return {Tensor(all.data(), ScalarType::Long, {int64_t(all.size())}, {1}),
            Tensor(&anchor_, ScalarType::Long, {}, {})};
  }

  Bytes& bytes_;
  Dtype dtype_;
  std::vector<std::unique_ptr<Memory>> memory_;
  std::vector<std::unique_ptr<std::vector<int64_t>>> addresses_;
  int64_t anchor_ = 0, rows_ = 0;
  bool counts_fit_ = true;
};

}  // namespace sanitize
