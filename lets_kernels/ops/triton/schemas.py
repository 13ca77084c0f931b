"""Every op's schema, as csrc/schemas.h has them."""

SCHEMAS = (
    "grad_norm(Tensor[] vectors, Tensor[] params, Tensor table, Tensor? filter_norms, float xi, float q) -> Tensor",
    "filter_norms(Tensor[] params, Tensor table, Tensor(a!) out) -> ()",
    "perturb_(Tensor(a!)[] params, Tensor[] vectors, Tensor(b!) saved, Tensor(c!) dirty, Tensor table, Tensor? "
    "filter_norms, float xi, float q, Tensor total, Tensor rho) -> ()",
    "restore_(Tensor(a!)[] params, Tensor saved, Tensor(b!) dirty, Tensor table) -> ()",
    "restore_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor saved, Tensor(c!) dirty, Tensor "
    "table, Tensor gate, float lr, float momentum, float weight_decay, bool nesterov, bool maximize) -> ()",
    "restore_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor saved, Tensor(e!) dirty, Tensor table, Tensor gate, float lr, float beta1, float "
    "beta2, float eps, float weight_decay, bool decoupled, bool maximize) -> ()",
    "rho_grad_diagonal(Tensor[] val, Tensor[] train, Tensor[] perturbed, Tensor[] vectors, Tensor[] params, Tensor "
    "table, Tensor? filter_norms, float xi, float q) -> Tensor",
    "rho_grad_secant(Tensor[] val, Tensor[] train, Tensor[] perturbed, Tensor[] first, Tensor table) -> Tensor",
    "dots(Tensor[] x, Tensor[] y, Tensor table) -> Tensor",
    "displacement_dots(Tensor[] grads, Tensor[] params, Tensor saved, Tensor table) -> Tensor",
    "combine_(Tensor(a!)[] out, Tensor[] x, Tensor[] y, Tensor table, Tensor coefficients, Tensor gate) -> ()",
    "average_(Tensor(a!)[] averages, Tensor[] vectors, Tensor(b!)[] out, Tensor(c!) updates, Tensor table, Tensor "
    "gate, float decay, float a, float b) -> Tensor",
    "posterior_ascent_(Tensor(a!)[] out, Tensor(b!)[] precisions, Tensor[] grads, Tensor table, Tensor gate, float "
    "beta2, float damping) -> ()",
    "restore_bsam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor[] precisions, Tensor saved, "
    "Tensor(c!) dirty, Tensor table, Tensor gate, float lr, float beta1, float weight_decay) -> ()",
    "noise_(Tensor(a!)[] out, Tensor[] vectors, Tensor[] precisions, Tensor table, Tensor? filter_norms, Tensor "
    "random, int stream, float a, float std) -> Tensor",
    "masked_(Tensor(a!)[] out, Tensor[] vectors, Tensor? mask, Tensor table, Tensor random, int stream, float share) "
    "-> Tensor",
    "count_above(Tensor[] vectors, Tensor mask, Tensor table, Tensor threshold, Tensor random, int stream, int "
    "member) -> Tensor",
    "select_(Tensor(a!) mask, Tensor[] vectors, Tensor table, Tensor threshold, Tensor random, int stream, int "
    "member, int value) -> ()",
    "largest(Tensor[] vectors, Tensor table) -> Tensor",
    "peaks_(Tensor(a!)[] out, Tensor[] vectors, Tensor table, Tensor largest) -> Tensor",
    "all_finite_(Tensor[] values, Tensor(a!) skipped) -> Tensor",
)
