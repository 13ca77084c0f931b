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
  m.def("dots(Tensor[] x, Tensor[] y, Tensor table) -> Tensor");
  m.def("displacement_dots(Tensor[] grads, Tensor[] params, Tensor saved, Tensor table) -> Tensor");
  m.def("combine_(Tensor(a!)[] out, Tensor[] x, Tensor[] y, Tensor table, Tensor coefficients, Tensor gate) -> ()");
  m.def(
      "average_(Tensor(a!)[] averages, Tensor[] vectors, Tensor(b!)[] out, Tensor(c!) updates, Tensor table, "
      "Tensor gate, float decay, float a, float b) -> Tensor");
  m.def(
      "posterior_ascent_(Tensor(a!)[] out, Tensor(b!)[] precisions, Tensor[] grads, Tensor table, Tensor gate, "
      "float beta2, float damping) -> ()");
  m.def(
      "restore_bsam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor[] precisions, Tensor saved, "
      "Tensor(c!) dirty, Tensor table, Tensor gate, float lr, float beta1, float weight_decay) -> ()");
  m.def(
      "noise_(Tensor(a!)[] out, Tensor[] vectors, Tensor[] precisions, Tensor table, Tensor? filter_norms, "
      "Tensor random, int stream, float a, float std) -> Tensor");
  m.def(
      "masked_(Tensor(a!)[] out, Tensor[] vectors, Tensor? mask, Tensor table, Tensor random, int stream, float share) "
      "-> Tensor");
  m.def(
      "count_above(Tensor[] vectors, Tensor mask, Tensor table, Tensor threshold, Tensor random, int stream, "
      "int member) -> Tensor");
  m.def(
      "select_(Tensor(a!) mask, Tensor[] vectors, Tensor table, Tensor threshold, Tensor random, int stream, "
      "int member, int value) -> ()");
  m.def("largest(Tensor[] vectors, Tensor table) -> Tensor");
  m.def("peaks_(Tensor(a!)[] out, Tensor[] vectors, Tensor table, Tensor largest) -> Tensor");
  m.def("all_finite_(Tensor[] values, Tensor(a!) skipped) -> Tensor");
}

}  // namespace lets
