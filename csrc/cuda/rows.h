// What an op needs on the device: results, and the rows of a call.
#pragma once

#include <algorithm>
#include <vector>

#include "../call.h"
#include "kernels.h"
#if defined(LETS_EMULATED)
#include "emulated_device.h"  // tests/emulator: the same kernels on CPU tensors
#else
#include "device.h"
#endif

namespace lets {

using cuda::Device;
using cuda::Row;

inline Tensor empty_doubles(int64_t numel, const Device& device) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &numel, &stride, aoti_torch_dtype_float64(), device.type(), device.index(), &handle));
  return Tensor(handle);
}

// A 0-d view of the first element: a sum and its slots are one allocation.
inline Tensor first_of(const Tensor& t) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 0, nullptr, nullptr, 0, &handle));
  return Tensor(handle);
}

// A view of the first elements: several sums.
inline Tensor first_of(const Tensor& t, int64_t numel) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 1, &numel, &stride, 0, &handle));
  return Tensor(handle);
}

// The rows of a call: the runs' addresses in each of its lists, their places in the bucket, and their scaling.
template <class C>
std::vector<Row> rows_of(const C& c) {
  static_assert(C::lists <= cuda::kLists, "a row has no place for so many lists");
  std::vector<Row> rows(size_t(c.table.size()));
  for (int64_t i = 0; i < c.table.size(); ++i) {
    Row& row = rows[size_t(i)];
    row = {{}, c.table[i].numel, kUnscaled, 0, nullptr};
    row.address[cuda::kStart] = reinterpret_cast<char*>(intptr_t(c.table[i].start));
    c.addresses(i, row.address);
    if constexpr (requires { c.scaling; }) {
      const Scaling s = c.scaling.at({i, 0, 0});
      row.row_length = s.row_length, row.row_count = s.row_count, row.norms = s.norms;
    }
  }
  return rows;
}

}  // namespace lets
