// What the CPU ops share: chunks on torch's threads, sums over them, new scalars.
#pragma once

#include "call.h"

namespace lets {

// A new tensor of a number, or of Three.
template <class Numbers>
Tensor tensor_of(const Numbers& numbers) {
  const Tensor to = empty_numbers(sizeof(Numbers) / sizeof(double), aoti_torch_device_type_cpu(), 0);
  *static_cast<Numbers*>(to.mutable_data_ptr()) = numbers;
  return to;
}

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
inline void add(double& sum, double x) { sum += x; }
inline void add(Three& sum, const Three& x) { sum.first += x.first, sum.second += x.second, sum.third += x.third; }
template <class Value, class F>
Tensor sum_over_chunks(const Table& table, const F& f) {
  Value total{};
  for (const Value& p : of_each_chunk<Value>(table, f)) add(total, p);
  return tensor_of(total);
}

// What the op does not read back may be written around the caches.
inline bool is_nontemporal(const Call& c) { return c.table.total() * size_of(c.dtype) >= kNontemporalBytes; }

}  // namespace lets
