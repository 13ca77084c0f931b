// The CUDA registration of the ops that make vectors and compare them: as ops.cpp.
#include "rows.h"

namespace lets {
namespace {

double* sums_in(const Tensor& t) { return static_cast<double*>(t.data_ptr()); }

Tensor dots(const Tensors& x, const Tensors& y, const Tensor& runs) {
  const Table table(runs);
  const Device device(x, y);
  const Dtype dtype = dtype_of_list(x, "x");
  const Runs u(x, table, dtype, device.where, "x"), v(y, table, dtype, device.where, "y");
  const auto rows = rows_of(table, {&u, &v});
  const Tensor sums = empty_doubles(3 * cuda::kSumElements, device);
  cuda::dots(dtype, rows.data(), table.size(), sums_in(sums), device.stream);
  return first_of(sums, 3);
}

Tensor displacement_dots(const Tensors& grads, const Tensors& params, const Tensor& saved, const Tensor& runs) {
  const Table table(runs);
  const Device device(grads, {saved});
  const Dtype dtype = dtype_of_list(grads, "grads");
  const Runs g(grads, table, dtype, device.where, "grads"), theta(params, table, dtype, device.where, "params"),
      before(Tensors{saved}, table, dtype, device.where, "saved");
  const auto rows = rows_of(table, {&g, &theta, &before});
  const Tensor sums = empty_doubles(3 * cuda::kSumElements, device);
  cuda::displacement_dots(dtype, rows.data(), table.size(), sums_in(sums), device.stream);
  return first_of(sums, 3);
}

void combine_(const Tensors& out, const Tensors& x, const Tensors& y, const Tensor& runs, const Tensor& coefficients,
              const Tensor& gate) {
  const Table table(runs);
  const Device device(out, {gate});
  const Dtype dtype = dtype_of_list(out, "out");
  const Runs to(out, table, dtype, device.where, "out"), u(x, table, dtype, device.where, "x"),
      v(y, table, dtype, device.where, "y");
  const auto rows = rows_of(table, {&to, &u, &v});
  cuda::combine(dtype, rows.data(), table.size(), coefficients_of(coefficients, device.where),
                scalar(gate, device.where, "gate"), device.stream);
}

Tensor average_(const Tensors& averages, const Tensors& vectors, const Tensors& out, const Tensor& updates,
                const Tensor& runs, const Tensor& gate, double decay, double a, double b) {
  const Table table(runs);
  const Device device(averages, {updates});
  const Dtype dtype = dtype_of_list(averages, "averages");
  const Runs m(averages, table, dtype, device.where, "averages"), x(vectors, table, dtype, device.where, "vectors"),
      to(out, table, dtype, device.where, "out", Need::optional);
  const auto rows = rows_of(table, {&m, &x, &to});
  int64_t* count = counter(updates, device.where, "updates");
  const double* open = scalar(gate, device.where, "gate");
  const Tensor sums = empty_doubles(cuda::kSumElements, device);
  cuda::average(dtype, rows.data(), table.size(), decay, a, b, count, open, sums_in(sums), device.stream);
  return first_of(sums);
}

void posterior_ascent_(const Tensors& out, const Tensors& precisions, const Tensors& grads, const Tensor& runs,
                       const Tensor& gate, double beta2, double damping) {
  const Table table(runs);
  const Device device(out, {gate});
  const Dtype dtype = dtype_of_list(out, "out");
  const Runs to(out, table, dtype, device.where, "out"), s(precisions, table, dtype, device.where, "precisions"),
      g(grads, table, dtype, device.where, "grads");
  const auto rows = rows_of(table, {&to, &s, &g});
  cuda::posterior_ascent(dtype, rows.data(), table.size(), beta2, damping, scalar(gate, device.where, "gate"),
                         device.stream);
}

Tensor noise_(const Tensors& out, const Tensors& vectors, const Tensors& precisions, const Tensor& runs,
              const std::optional<Tensor>& filter_norms, const Tensor& random, int64_t stream, double a, double std) {
  const Table table(runs);
  const Device device(out, {random});
  const Dtype dtype = dtype_of_list(out, "out");
  const Runs to(out, table, dtype, device.where, "out"),
      v(vectors, table, dtype, device.where, "vectors", Need::optional),
      s(precisions, table, dtype, device.where, "precisions", Need::optional);
  auto rows = rows_of(table, {&to, &v, &s});
  if (s.empty()) {
    const Scalings filters(table, filter_norms, dtype, 0, device.where);
    rows = rows_of(table, {&to, &v, &s}, &filters);
    for (Row& row : rows) row.row_length = row.row_length > 0 ? row.row_length : -1;  // no other T means anything here
  }
  const Tensor sums = empty_doubles(cuda::kSumElements, device);
  cuda::noise(dtype, rows.data(), table.size(), random_of(random, device.where), uint32_t(stream), a, std,
              sums_in(sums), device.stream);
  return first_of(sums);
}

// Gives every row the address of its own mask, as list `number`.
void add_mask(std::vector<Row>& rows, const Table& table, uint8_t* mask, int number) {
  for (int64_t i = 0; i < table.size(); ++i)
    rows[size_t(i)].address[number] = reinterpret_cast<char*>(mask + table[i].start);
}

Tensor masked_(const Tensors& out, const Tensors& vectors, const std::optional<Tensor>& mask, const Tensor& runs,
               const Tensor& random, int64_t stream, double share) {
  const Table table(runs);
  const Device device(out, {random});
  const Dtype dtype = dtype_of_list(out, "out");
  const Runs to(out, table, dtype, device.where, "out"), v(vectors, table, dtype, device.where, "vectors");
  STD_TORCH_CHECK(mask.has_value() || (share > 0 && share <= 1), "share must be above 0 and at most 1, not ", share);
  auto rows = rows_of(table, {&to, &v});
  if (mask.has_value()) add_mask(rows, table, mask_of(*mask, table, device.where), 2);
  const Tensor sums = empty_doubles(cuda::kSumElements, device);
  cuda::masked(dtype, rows.data(), table.size(), random_of(random, device.where), uint32_t(stream), share,
               sums_in(sums), device.stream);
  return first_of(sums);
}

Tensor count_above(const Tensors& vectors, const Tensor& mask, const Tensor& runs, const Tensor& threshold,
                   const Tensor& random, int64_t stream, int64_t member) {
  check_mask_value(member, -1, "member");
  const Table table(runs);
  const Device device(vectors, {mask});
  const Dtype dtype = dtype_of_list(vectors, "vectors");
  const Runs v(vectors, table, dtype, device.where, "vectors", Need::optional);
  auto rows = rows_of(table, {&v});
  add_mask(rows, table, mask_of(mask, table, device.where), 1);
  const Tensor sums = empty_doubles(cuda::kSumElements, device);
  cuda::count_above(dtype, rows.data(), table.size(), counter(threshold, device.where, "threshold"),
                    random_of(random, device.where), uint32_t(stream), member, sums_in(sums), device.stream);
  return first_of(sums);
}

void select_(const Tensor& mask, const Tensors& vectors, const Tensor& runs, const Tensor& threshold,
             const Tensor& random, int64_t stream, int64_t member, int64_t value) {
  const Table table(runs);
  const Device device(vectors, {mask});
  const Dtype dtype = dtype_of_list(vectors, "vectors");
  const Runs v(vectors, table, dtype, device.where, "vectors", Need::optional);
  check_mask_value(member, -1, "member");
  check_mask_value(value, 0, "value");
  auto rows = rows_of(table, {&v});
  add_mask(rows, table, mask_of(mask, table, device.where), 1);
  cuda::select_above(dtype, rows.data(), table.size(), counter(threshold, device.where, "threshold"),
                     random_of(random, device.where), uint32_t(stream), member, uint8_t(value), device.stream);
}

Tensor largest(const Tensors& vectors, const Tensor& runs) {
  const Table table(runs);
  const Device device(vectors, {});
  const Dtype dtype = dtype_of_list(vectors, "vectors");
  const Runs v(vectors, table, dtype, device.where, "vectors");
  const auto rows = rows_of(table, {&v});
  const Tensor sums = empty_doubles(cuda::kSumElements, device);
  cuda::largest(dtype, rows.data(), table.size(), sums_in(sums), device.stream);
  return first_of(sums);
}

Tensor peaks_(const Tensors& out, const Tensors& vectors, const Tensor& runs, const Tensor& largest) {
  const Table table(runs);
  const Device device(out, {largest});
  const Dtype dtype = dtype_of_list(out, "out");
  const Runs to(out, table, dtype, device.where, "out"), v(vectors, table, dtype, device.where, "vectors");
  const auto rows = rows_of(table, {&to, &v});
  const Tensor sums = empty_doubles(cuda::kSumElements, device);
  cuda::peaks(dtype, rows.data(), table.size(), scalar(largest, device.where, "largest"), sums_in(sums), device.stream);
  return first_of(sums);
}

}  // namespace
}  // namespace lets

#if defined(LETS_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(lets_kernels_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(lets_kernels, CUDA, m) {
#endif
  m.impl("dots", TORCH_BOX(&lets::dots));
  m.impl("displacement_dots", TORCH_BOX(&lets::displacement_dots));
  m.impl("combine_", TORCH_BOX(&lets::combine_));
  m.impl("average_", TORCH_BOX(&lets::average_));
  m.impl("posterior_ascent_", TORCH_BOX(&lets::posterior_ascent_));
  m.impl("noise_", TORCH_BOX(&lets::noise_));
  m.impl("masked_", TORCH_BOX(&lets::masked_));
  m.impl("count_above", TORCH_BOX(&lets::count_above));
  m.impl("select_", TORCH_BOX(&lets::select_));
  m.impl("largest", TORCH_BOX(&lets::largest));
  m.impl("peaks_", TORCH_BOX(&lets::peaks_));
}
