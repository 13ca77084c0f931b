// What the CPU ops share: chunks on torch's threads, sums over them, new scalars.
#pragma once

#include "call.h"

namespace lets {

// A new float64 tensor: of one number with no dimensions, or of several with one.
inline Tensor make_numbers(const double* values, int64_t numel, int64_t dimensions) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dimensions, &numel, &stride, aoti_torch_dtype_float64(),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  Tensor out(handle);
  auto* to = static_cast<double*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < numel; ++i) to[i] = values[i];
  return out;
}
inline Tensor make_scalar(double value) { return make_numbers(&value, 1, 0); }

template <class F>
void over_chunks(const Table& table, const F& f) {
  const auto chunks = table.chunks();
  for_each(int64_t(chunks.size()), table.total(), [&](int64_t i) { f(chunks[size_t(i)]); });
}

// What f makes of each chunk, in the order of the chunks: added up in it, the bits do not depend on who made what.
template <class Value, class F>
std::vector<Value> of_each_chunk(const Table& table, const F& f) {
  const auto chunks = table.chunks();
  std::vector<Value> partial(chunks.size());
  for_each(int64_t(chunks.size()), table.total(), [&](int64_t i) { partial[size_t(i)] = f(chunks[size_t(i)]); });
  return partial;
}
template <class Value, class F>
Tensor sum_over_chunks(const Table& table, const F& f) {
  double total[3] = {};
  if constexpr (std::is_same_v<Value, double>) {
    for (double p : of_each_chunk<double>(table, f)) total[0] += p;
    return make_scalar(total[0]);
  } else {
    for (const Three& p : of_each_chunk<Three>(table, f))
      total[0] += p.first, total[1] += p.second, total[2] += p.third;
    return make_numbers(total, 3, 1);
  }
}

// What the op does not read back may be written around the caches.
inline bool streams(const Call& c) { return c.table.total() * size_of(c.dtype) >= kStreamBytes; }

}  // namespace lets
