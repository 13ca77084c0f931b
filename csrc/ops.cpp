// Every op's schema in one list, the CPU registration of those that take a step, and the Python module _C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "chunks.h"
#include "isa.h"
#include "math.h"
#include "schemas.h"

namespace lets {
namespace {

Tensor grad_norm(const Tensors& vectors, const Tensors& params, const Tensor& runs,
                 const std::optional<Tensor>& filter_norms, double xi, double q) {
  STD_TORCH_CHECK(q >= 1, "q must be at least 1, not ", q);
  const Table table(runs);
  const Dtype dtype = dtype_of_list(vectors, "vectors");
  const Runs v(vectors, table, dtype, kCpu, "vectors"), theta(params, table, dtype, kCpu, "params", Need::optional);
  const Scalings scaling(table, params, filter_norms, dtype, xi, kCpu);
  return sum_over_chunks(table, [&](const Chunk& c) {
    return cpu::kernels().norm(dtype, v.at(c), theta.at(c), c.numel, scaling.at(c), q);
  });
}

void filter_norms(const Tensors& params, const Tensor& runs, const Tensor& out) {
  const Table table(runs);
  if (table.rows() == 0) return;
  const Dtype dtype = dtype_of_list(params, "params");
  const Runs theta(params, table, dtype, kCpu, "params");
  const bool wide = dtype == Dtype::float64;
  void* to = Scalings::filter_norms_of(out, table, dtype, kCpu, "out");
  // Rows are small and many: a thread takes a chunk's worth of them at a time.
  struct Rows {
    int64_t run, begin, end;
  };
  std::vector<Rows> work;
  for (int64_t i = 0; i < table.size(); ++i) {
    const Run& run = table[i];
    if (run.row_length < 1) continue;
    const int64_t step = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, run.numel / run.row_count));
    for (int64_t r = 0; r < run.row_count; r += step) work.push_back({i, r, std::min(r + step, run.row_count)});
  }
  for_each(int64_t(work.size()), table.total(), [&](int64_t i) {
    const Rows& rows = work[size_t(i)];
    const Run& run = table[rows.run];
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const double norm =
          cpu::kernels().filter_norm(dtype, theta.run(rows.run), run.numel, run.row_length, run.row_count, row);
      if (wide) {
        static_cast<double*>(to)[run.row_start + row] = norm;
      } else {
        static_cast<float*>(to)[run.row_start + row] = float(norm);
      }
    }
  });
}

void perturb_(const Tensors& params, const Tensors& vectors, const Tensor& saved, const Tensor& dirty,
              const Tensor& runs, const std::optional<Tensor>& filter_norms, double xi, double q, const Tensor& total,
              const Tensor& rho) {
  STD_TORCH_CHECK(q >= 1, "q must be at least 1, not ", q);
  const Table table(runs);
  const Dtype dtype = dtype_of_list(params, "params");
  const Runs theta(params, table, dtype, kCpu, "params"), v(vectors, table, dtype, kCpu, "vectors", Need::optional),
      to(Tensors{saved}, table, dtype, kCpu, "saved");
  const Scalings scaling(table, params, filter_norms, dtype, xi, kCpu);
  const double sum = *scalar(total, kCpu, "total"), radius = *scalar(rho, kCpu, "rho");
  int64_t& flag = *counter(dirty, kCpu, "dirty");
  const bool stream = streams(table, dtype);
  over_chunks(table, [&](const Chunk& c) {
    cpu::kernels().perturb(dtype, theta.at(c), v.at(c), to.at(c), c.numel, scaling.at(c), q, sum, radius, stream);
  });
  flag = 1;
}

void copy_back(const Table& table, const Runs& theta, const Runs& from, Dtype dtype) {
  const bool stream = streams(table, dtype);
  over_chunks(table, [&](const Chunk& c) {
    cpu::kernels().restore(theta.at(c), from.at(c), c.numel * size_of(dtype), stream);
  });
}

void restore_(const Tensors& params, const Tensor& saved, const Tensor& dirty, const Tensor& runs) {
  const Table table(runs);
  const Dtype dtype = dtype_of_list(params, "params");
  const Runs theta(params, table, dtype, kCpu, "params"), from(Tensors{saved}, table, dtype, kCpu, "saved");
  int64_t& flag = *counter(dirty, kCpu, "dirty");
  if (flag != 0) copy_back(table, theta, from, dtype);
  flag = 0;
}

void restore_sgd_(const Tensors& params, const Tensors& grads, const Tensors& momenta, const Tensor& saved,
                  const Tensor& dirty, const Tensor& runs, const Tensor& gate, double lr, double momentum,
                  double weight_decay, bool nesterov, bool maximize) {
  const Table table(runs);
  const Dtype dtype = dtype_of_list(params, "params");
  const Runs theta(params, table, dtype, kCpu, "params"), g(grads, table, dtype, kCpu, "grads"),
      m(momenta, table, dtype, kCpu, "momenta", Need::optional), before(Tensors{saved}, table, dtype, kCpu, "saved");
  STD_TORCH_CHECK(table.total() == 0 || m.empty() == (momentum == 0), "momenta go with a momentum that is not zero");
  int64_t& flag = *counter(dirty, kCpu, "dirty");
  const Runs& from = flag != 0 ? before : theta;
  if (*scalar(gate, kCpu, "gate") == 0) {
    if (flag != 0) copy_back(table, theta, from, dtype);
  } else {
    const SgdOptions options{lr, momentum, weight_decay, nesterov, maximize};
    const bool stream = streams(table, dtype);
    over_chunks(table, [&](const Chunk& c) {
      cpu::kernels().sgd(dtype, theta.at(c), g.at(c), m.at(c), from.at(c), c.numel, options, stream);
    });
  }
  flag = 0;
}

void restore_adamw_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                    const Tensors& steps, const Tensor& saved, const Tensor& dirty, const Tensor& runs,
                    const Tensor& gate, double lr, double beta1, double beta2, double eps, double weight_decay,
                    bool decoupled, bool maximize) {
  const Table table(runs);
  const Dtype dtype = dtype_of_list(params, "params");
  const Runs theta(params, table, dtype, kCpu, "params"), g(grads, table, dtype, kCpu, "grads"),
      m(exp_avgs, table, dtype, kCpu, "exp_avgs"), v(exp_avg_sqs, table, dtype, kCpu, "exp_avg_sqs"),
      before(Tensors{saved}, table, dtype, kCpu, "saved");
  const std::vector<float*> step = step_counts(steps, table, kCpu);
  int64_t& flag = *counter(dirty, kCpu, "dirty");
  const Runs& from = flag != 0 ? before : theta;
  if (*scalar(gate, kCpu, "gate") == 0) {
    if (flag != 0) copy_back(table, theta, from, dtype);
  } else {
    const AdamOptions options{lr, beta1, beta2, eps, weight_decay, decoupled, maximize};
    const bool stream = streams(table, dtype);
    for (float* s : step) *s += 1;
    over_chunks(table, [&](const Chunk& c) {
      cpu::kernels().adam(dtype, theta.at(c), g.at(c), m.at(c), v.at(c), from.at(c), c.numel, *step[size_t(c.run)],
                          options, stream);
    });
  }
  flag = 0;
}

void restore_bsam_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& precisions,
                   const Tensor& saved, const Tensor& dirty, const Tensor& runs, const Tensor& gate, double lr,
                   double beta1, double weight_decay) {
  const Table table(runs);
  const Dtype dtype = dtype_of_list(params, "params");
  const Runs theta(params, table, dtype, kCpu, "params"), g(grads, table, dtype, kCpu, "grads"),
      m(exp_avgs, table, dtype, kCpu, "exp_avgs"), s(precisions, table, dtype, kCpu, "precisions"),
      before(Tensors{saved}, table, dtype, kCpu, "saved");
  int64_t& flag = *counter(dirty, kCpu, "dirty");
  const Runs& from = flag != 0 ? before : theta;
  if (*scalar(gate, kCpu, "gate") == 0) {
    if (flag != 0) copy_back(table, theta, from, dtype);
  } else {
    const bool stream = streams(table, dtype);
    over_chunks(table, [&](const Chunk& c) {
      cpu::kernels().bsam(dtype, theta.at(c), g.at(c), m.at(c), s.at(c), from.at(c), c.numel, lr, beta1, weight_decay,
                          stream);
    });
  }
  flag = 0;
}

Tensor rho_grad_diagonal(const Tensors& val, const Tensors& train, const Tensors& perturbed, const Tensors& vectors,
                         const Tensors& params, const Tensor& runs, const std::optional<Tensor>& filter_norms,
                         double xi, double q) {
  STD_TORCH_CHECK(q >= 1, "q must be at least 1, not ", q);
  const Table table(runs);
  const Dtype dtype = dtype_of_list(val, "val");
  const Runs a(val, table, dtype, kCpu, "val"), b(train, table, dtype, kCpu, "train", Need::optional),
      h(perturbed, table, dtype, kCpu, "perturbed"), v(vectors, table, dtype, kCpu, "vectors"),
      theta(params, table, dtype, kCpu, "params", Need::optional);
  const Scalings scaling(table, params, filter_norms, dtype, xi, kCpu);
  return sum_over_chunks(table, [&](const Chunk& c) {
    return cpu::kernels().rho_diagonal(dtype, a.at(c), b.at(c), h.at(c), v.at(c), theta.at(c), c.numel, scaling.at(c),
                                       q);
  });
}

Tensor rho_grad_secant(const Tensors& val, const Tensors& train, const Tensors& perturbed, const Tensors& first,
                       const Tensor& runs) {
  const Table table(runs);
  const Dtype dtype = dtype_of_list(val, "val");
  const Runs a(val, table, dtype, kCpu, "val"), b(train, table, dtype, kCpu, "train", Need::optional),
      h(perturbed, table, dtype, kCpu, "perturbed"), g(first, table, dtype, kCpu, "first");
  return sum_over_chunks(table, [&](const Chunk& c) {
    return cpu::kernels().rho_secant(dtype, a.at(c), b.at(c), h.at(c), g.at(c), c.numel);
  });
}

Tensor all_finite_(const Tensors& values, const Tensor& skipped) {
  bool finite = true;
  for (const Tensor& v : values) finite = is_finite(*scalar(v, kCpu, "values")) && finite;
  if (!finite) *counter(skipped, kCpu, "skipped") += 1;
  return make_scalar(finite ? 1 : 0);
}

}  // namespace
}  // namespace lets

STABLE_TORCH_LIBRARY(lets_kernels, m) { lets::define(m); }

STABLE_TORCH_LIBRARY_IMPL(lets_kernels, CPU, m) {
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

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels of lets_kernels; importing it registers torch.ops.lets_kernels.*";
  m.def("cpu_isa", &lets::cpu::current_isa, "The instruction set that the CPU kernels use.");
  m.def("supported_cpu_isas", &lets::cpu::supported_isas, "Built in and supported here, the best one last.");
  m.def("use_cpu_isa", &lets::cpu::use_isa, pybind11::arg("name"),
        "Use another supported instruction set; ValueError names the choices. Not while an op runs.");
}
