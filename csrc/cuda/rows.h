// What the registrations of the ops share: results on the device, and the rows of a call.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#include "../runs.h"
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
inline std::vector<Row> rows_of(const Table& table, std::initializer_list<const Runs*> lists,
                                const Scalings* scalings = nullptr) {
  std::vector<Row> rows(size_t(table.size()));
  for (int64_t i = 0; i < table.size(); ++i) {
    Row& row = rows[size_t(i)];
    row = {{}, table[i].numel, -1, 0, nullptr};
    row.address[cuda::kStart] = reinterpret_cast<char*>(intptr_t(table[i].start));
    int l = 0;
    for (const Runs* list : lists) row.address[l++] = list->run(i);
    if (scalings) {
      const Scaling s = scalings->at({i, 0, 0});
      row.row_length = s.row_length, row.row_count = s.row_count, row.norms = s.norms;
    }
  }
  return rows;
}

}  // namespace lets
