// Every op's schema, in one list.
#pragma once

namespace lets {

template <class Library>
void define(Library& m) {
  m.def(
      "grad_norm(Tensor[] vectors, Tensor[] params, Tensor table, Tensor? filter_norms, float xi, float q) -> Tensor");
  m.def("filter_norms(Tensor[] params, Tensor table, Tensor(a!) out) -> ()");
  m.def(
      "perturb_(Tensor(a!)[] params, Tensor[] vectors, Tensor(b!) saved, Tensor(c!) dirty, Tensor table, "
      "Tensor? filter_norms, float xi, float q, Tensor total, Tensor rho) -> ()");
  m.def("restore_(Tensor(a!)[] params, Tensor saved, Tensor(b!) dirty, Tensor table) -> ()");
  m.def(
      "restore_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor saved, Tensor(c!) dirty, "
      "Tensor table, Tensor gate, float lr, float momentum, float weight_decay, bool nesterov, bool maximize) -> ()");
  m.def(
      "restore_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] steps, Tensor saved, Tensor(e!) dirty, Tensor table, Tensor gate, float lr, float beta1, "
      "float beta2, float eps, float weight_decay, bool decoupled, bool maximize) -> ()");
  m.def(
      "rho_grad_diagonal(Tensor[] val, Tensor[] train, Tensor[] perturbed, Tensor[] vectors, Tensor[] params, "
      "Tensor table, Tensor? filter_norms, float xi, float q) -> Tensor");
  m.def("rho_grad_secant(Tensor[] val, Tensor[] train, Tensor[] perturbed, Tensor[] first, Tensor table) -> Tensor");
  m.def("all_finite_(Tensor[] values, Tensor(a!) skipped) -> Tensor");
}

}  // namespace lets
