// The CUDA registration of the ops: checks the arguments, gathers the addresses, enqueues the kernels.
//
// Compiled by the host's compiler alone; what needs nvcc is behind kernels.h. Nothing here waits for the device.
#include "../schemas.h"
#include "rows.h"

namespace lets {
namespace {

Tensor grad_norm(const Tensors& vectors, const Tensors& params, const Tensor& runs,
                 const std::optional<Tensor>& filter_norms, double xi, double q) {
  STD_TORCH_CHECK(q >= 1, "q must be at least 1, not ", q);
  const Table table(runs);
  const Device device(vectors, params);
  const Dtype dtype = dtype_of_list(vectors, "vectors");
  const Runs v(vectors, table, dtype, device.where, "vectors"),
      theta(params, table, dtype, device.where, "params", Need::optional);
  const Scalings scaling(table, params, filter_norms, dtype, xi, device.where);
  const auto rows = rows_of(table, {&v, &theta}, &scaling);
  const Tensor sums = empty_doubles(cuda::kSumElements, device);
  cuda::norm(dtype, rows.data(), table.size(), xi, q, static_cast<double*>(sums.data_ptr()), device.stream);
  return first_of(sums);
}

void filter_norms(const Tensors& params, const Tensor& runs, const Tensor& out) {
  const Table table(runs);
  if (table.rows() == 0) return;
  const Device device(params, {out});
  const Dtype dtype = dtype_of_list(params, "params");
  const Runs theta(params, table, dtype, device.where, "params");
  const char* to = Scalings::filter_norms_of(out, table, dtype, device.where, "out");
  auto rows = rows_of(table, {&theta});
  for (int64_t i = 0; i < table.size(); ++i) {
    Row& row = rows[size_t(i)];
    row.row_length = table[i].row_length, row.row_count = table[i].row_count;
    row.norms = to + table[i].row_start * (dtype == Dtype::float64 ? 8 : 4);
  }
  cuda::filter_norms(dtype, rows.data(), table.size(), device.stream);
}

void perturb_(const Tensors& params, const Tensors& vectors, const Tensor& saved, const Tensor& dirty,
              const Tensor& runs, const std::optional<Tensor>& filter_norms, double xi, double q, const Tensor& total,
              const Tensor& rho) {
  STD_TORCH_CHECK(q >= 1, "q must be at least 1, not ", q);
  const Table table(runs);
  const Device device(params, {dirty});
  const Dtype dtype = dtype_of_list(params, "params");
  const Runs theta(params, table, dtype, device.where, "params"),
      v(vectors, table, dtype, device.where, "vectors", Need::optional),
      to(Tensors{saved}, table, dtype, device.where, "saved");
  const Scalings scaling(table, params, filter_norms, dtype, xi, device.where);
  const auto rows = rows_of(table, {&theta, &v, &to}, &scaling);
  cuda::perturb(dtype, rows.data(), table.size(), xi, q, scalar(total, device.where, "total"),
                scalar(rho, device.where, "rho"), counter(dirty, device.where, "dirty"), device.stream);
}

void restore_(const Tensors& params, const Tensor& saved, const Tensor& dirty, const Tensor& runs) {
  const Table table(runs);
  const Device device(params, {dirty});
  const Dtype dtype = dtype_of_list(params, "params");
  const Runs theta(params, table, dtype, device.where, "params"),
      from(Tensors{saved}, table, dtype, device.where, "saved");
  const auto rows = rows_of(table, {&theta, &from});
  cuda::restore(dtype, rows.data(), table.size(), counter(dirty, device.where, "dirty"), device.stream);
}

void restore_sgd_(const Tensors& params, const Tensors& grads, const Tensors& momenta, const Tensor& saved,
                  const Tensor& dirty, const Tensor& runs, const Tensor& gate, double lr, double momentum,
                  double weight_decay, bool nesterov, bool maximize) {
  const Table table(runs);
  const Device device(params, {dirty});
  const Dtype dtype = dtype_of_list(params, "params");
  const Runs theta(params, table, dtype, device.where, "params"), g(grads, table, dtype, device.where, "grads"),
      m(momenta, table, dtype, device.where, "momenta", Need::optional),
      before(Tensors{saved}, table, dtype, device.where, "saved");
  STD_TORCH_CHECK(table.total() == 0 || m.empty() == (momentum == 0), "momenta go with a momentum that is not zero");
  const auto rows = rows_of(table, {&theta, &g, &m, &before});
  cuda::sgd(dtype, rows.data(), table.size(), {lr, momentum, weight_decay, nesterov, maximize},
            scalar(gate, device.where, "gate"), counter(dirty, device.where, "dirty"), device.stream);
}

void restore_adamw_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                    const Tensors& steps, const Tensor& saved, const Tensor& dirty, const Tensor& runs,
                    const Tensor& gate, double lr, double beta1, double beta2, double eps, double weight_decay,
                    bool decoupled, bool maximize) {
  const Table table(runs);
  const Device device(params, {dirty});
  const Dtype dtype = dtype_of_list(params, "params");
  const Runs theta(params, table, dtype, device.where, "params"), g(grads, table, dtype, device.where, "grads"),
      m(exp_avgs, table, dtype, device.where, "exp_avgs"), v(exp_avg_sqs, table, dtype, device.where, "exp_avg_sqs"),
      before(Tensors{saved}, table, dtype, device.where, "saved");
  const std::vector<float*> step = step_counts(steps, table, device.where);
  auto rows = rows_of(table, {&theta, &g, &m, &v, &before});
  for (size_t i = 0; i < rows.size(); ++i) rows[i].address[5] = reinterpret_cast<char*>(step[i]);
  cuda::adam(dtype, rows.data(), table.size(), {lr, beta1, beta2, eps, weight_decay, decoupled, maximize},
             scalar(gate, device.where, "gate"), counter(dirty, device.where, "dirty"), device.stream);
}

void restore_bsam_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& precisions,
                   const Tensor& saved, const Tensor& dirty, const Tensor& runs, const Tensor& gate, double lr,
                   double beta1, double weight_decay) {
  const Table table(runs);
  const Device device(params, {dirty});
  const Dtype dtype = dtype_of_list(params, "params");
  const Runs theta(params, table, dtype, device.where, "params"), g(grads, table, dtype, device.where, "grads"),
      m(exp_avgs, table, dtype, device.where, "exp_avgs"), s(precisions, table, dtype, device.where, "precisions"),
      before(Tensors{saved}, table, dtype, device.where, "saved");
  const auto rows = rows_of(table, {&theta, &g, &m, &s, &before});
  cuda::bsam(dtype, rows.data(), table.size(), lr, beta1, weight_decay, scalar(gate, device.where, "gate"),
             counter(dirty, device.where, "dirty"), device.stream);
}

Tensor rho_grad_diagonal(const Tensors& val, const Tensors& train, const Tensors& perturbed, const Tensors& vectors,
                         const Tensors& params, const Tensor& runs, const std::optional<Tensor>& filter_norms,
                         double xi, double q) {
  STD_TORCH_CHECK(q >= 1, "q must be at least 1, not ", q);
  const Table table(runs);
  const Device device(val, params);
  const Dtype dtype = dtype_of_list(val, "val");
  const Runs a(val, table, dtype, device.where, "val"), b(train, table, dtype, device.where, "train", Need::optional),
      h(perturbed, table, dtype, device.where, "perturbed"), v(vectors, table, dtype, device.where, "vectors"),
      theta(params, table, dtype, device.where, "params", Need::optional);
  const Scalings scaling(table, params, filter_norms, dtype, xi, device.where);
  const auto rows = rows_of(table, {&a, &b, &h, &v, &theta}, &scaling);
  const Tensor sums = empty_doubles(cuda::kSumElements, device);
  cuda::rho_diagonal(dtype, rows.data(), table.size(), xi, q, static_cast<double*>(sums.data_ptr()), device.stream);
  return first_of(sums);
}

Tensor rho_grad_secant(const Tensors& val, const Tensors& train, const Tensors& perturbed, const Tensors& first,
                       const Tensor& runs) {
  const Table table(runs);
  const Device device(val, first);
  const Dtype dtype = dtype_of_list(val, "val");
  const Runs a(val, table, dtype, device.where, "val"), b(train, table, dtype, device.where, "train", Need::optional),
      h(perturbed, table, dtype, device.where, "perturbed"), g(first, table, dtype, device.where, "first");
  const auto rows = rows_of(table, {&a, &b, &h, &g});
  const Tensor sums = empty_doubles(cuda::kSumElements, device);
  cuda::rho_secant(dtype, rows.data(), table.size(), static_cast<double*>(sums.data_ptr()), device.stream);
  return first_of(sums);
}

Tensor all_finite_(const Tensors& values, const Tensor& skipped) {
  const Device device(values, {skipped});
  std::vector<const double*> addresses;
  for (const Tensor& v : values) addresses.push_back(scalar(v, device.where, "values"));
  const Tensor finite = empty_doubles(1, device);
  cuda::all_finite(addresses.data(), int64_t(addresses.size()), static_cast<double*>(finite.data_ptr()),
                   counter(skipped, device.where, "skipped"), device.stream);
  return first_of(finite);
}

}  // namespace
}  // namespace lets

#if defined(LETS_EMULATED)
STABLE_TORCH_LIBRARY(lets_kernels_emulated, m) { lets::define(m); }
STABLE_TORCH_LIBRARY_IMPL(lets_kernels_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(lets_kernels, CUDA, m) {
#endif
  m.impl("grad_norm", TORCH_BOX(&lets::grad_norm));
  m.impl("filter_norms", TORCH_BOX(&lets::filter_norms));
  m.impl("perturb_", TORCH_BOX(&lets::perturb_));
  m.impl("restore_", TORCH_BOX(&lets::restore_));
  m.impl("restore_sgd_", TORCH_BOX(&lets::restore_sgd_));
  m.impl("restore_adamw_", TORCH_BOX(&lets::restore_adamw_));
  m.impl("restore_bsam_", TORCH_BOX(&lets::restore_bsam_));
  m.impl("rho_grad_diagonal", TORCH_BOX(&lets::rho_grad_diagonal));
  m.impl("rho_grad_secant", TORCH_BOX(&lets::rho_grad_secant));
  m.impl("all_finite_", TORCH_BOX(&lets::all_finite_));
}
