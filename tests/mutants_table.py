"""The mutations of `make mutants`: one file's text, what takes its place, and the tests of which one must go red.

Each text stands exactly once in its file. A mutation says something wrong, and runs: one that fails to import proves
nothing, and one that computes the same is none.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    text: str
    replacement: str
    tests: str  # what pytest gets

    @property
    def compiled(self):
        return self.file.startswith("csrc/")


REFERENCE = "lets_kernels/ops/reference/"
MATH = "csrc/math.h"
FROM_SAVED = "old = torch.where(from_saved, old, theta)\n        "
SIGNED = "weights, step = wide(old), -wide(g) if maximize else wide(g)\n        if weight_decay:"
SAVING = "old in zip(thetas, runs([saved], table), strict=True):\n        old.copy_(theta)"
RESTORING = "            if self.is_perturbed:\n                a.bucket.restore(a.runs)\n        self"
NORM = "tests/test_norm.py -k '{} and several and float32'"
PERTURB = "tests/test_perturb.py -k '{} and (every_q and float32 or zero or restore or powers or element-several)'"
STEP = "tests/test_step.py -k '{} and (every_kind and float32 or gate or size_zero or starts_from)'"
TWO_BYTES = "tests/test_perturb.py -k 'two_bytes and not emulated'"
EPS = "tests/test_step.py -k 'eps_is_added and not emulated'"
ALL_FINITE = "tests/test_norm.py -k 'all_finite and not emulated'"
LEARNED = "tests/test_hypergradient.py tests/test_methods.py -k 'reference and (rounding or lets and secant)'"
DIRECTED = "tests/test_methods.py -k 'reference and (every_method or diagonal and lets_takes)'"
RHO = "tests/test_rho.py -k '{} and (every_q or secant_of) and float64'"

#: file, tests, and pairs of text and replacement; a pair may have tests of its own.
GROUPS = [
    (
        REFERENCE + "norm.py",
        NORM.format("reference"),
        [
            ("return wide(theta).abs() + xi", "return wide(theta).abs()"),
            ("return wide(theta).abs() + xi", "return wide(theta) + xi"),
            ("return filter_norms[row_start + index] + xi", "return filter_norms[row_start + index]"),
            ('.div(row_length, rounding_mode="floor") % row_count', " % row_count"),
            (
                "scaled.double().abs().pow(q).sum()",
                "scaled.double().abs().pow(2).sum()",
                "tests/test_norm.py -k 'reference and every_q'",
            ),
            ("total += scaled.double()", "total += scaled.half().double()"),
            ("filters.square().sum(dim=(0, 2)).sqrt()", "filters.square().sum(dim=(0, 2))"),
            ("filters.square().sum(dim=(0, 2)).sqrt()", "filters.square().mean(dim=(0, 2)).sqrt()"),
            ("return finite.double()", "return torch.ones_like(finite).double()", ALL_FINITE),
            ("(~finite).to(skipped.dtype)", "finite.to(skipped.dtype)", ALL_FINITE),
            ("for v in values]).all()", "for v in values]).any()", ALL_FINITE),
        ],
    ),
    (
        REFERENCE + "perturb.py",
        PERTURB.format("reference"),
        [
            ("x.sign() * x.abs().pow(q - 1)", "x.abs().pow(q - 1)"),
            ("x.sign() * x.abs().pow(q - 1)", "x.sign() * x.abs().pow(q)"),
            ("length = rho / total.sqrt() if q == 2", "length = rho / total if q == 2"),
            ("shrink = total.pow(-1 / q) if", "shrink = total.pow(-1 / 2) if"),
            ("wide(theta) + factor * (t * dual(scaled, q))", "wide(theta) - factor * (t * dual(scaled, q))"),
            ("wide(theta) + factor * (t * dual(scaled, q))", "wide(theta) + factor * dual(scaled, q)"),
            ("usable = torch.isfinite(total) & (total > 0)", "usable = torch.isfinite(total)"),
            ("usable = torch.isfinite(total) & (total > 0)", "usable = total > 0"),
            ("& factor.isfinite() & inner.isfinite()", ""),
            (SAVING + "\n    dirty.fill_(1)", SAVING),
            ("theta.copy_(torch.where(dirty != 0, old, theta))", "theta.copy_(old)"),
        ],
    ),
    (
        REFERENCE + "step.py",
        STEP.format("reference"),
        [
            (SIGNED, SIGNED.replace("-wide(g) if maximize else ", "")),
            (FROM_SAVED + SIGNED, SIGNED),
            ("average = momentum * wide(m) + step", "average = momentum * (wide(m) + step)"),
            ("step + momentum * average if nesterov else average", "average"),
            ("new = weights - lr * step if lr else weights", "new = weights + lr * step if lr else weights"),
            ("new = weights - lr * step if lr else weights", "new = weights - lr * step"),
            (
                "m.copy_(torch.where(go, average.to(m.dtype), m))\n        new",
                "m.copy_(average.to(m.dtype))\n        new",
            ),
            ("weights * (1 - lr * weight_decay)", "weights * (1 - weight_decay)"),
            ("wide(m) + (1 - beta1) * (step - wide(m))", "wide(m) + beta1 * (step - wide(m))"),
            ("beta2 * wide(v) + (1 - beta2) * (step * step)", "beta2 * wide(v) + step * step"),
            ("(lr / (1 - beta1**count)).to", "(lr * count**0).to"),
            ("(1 - beta2**count).sqrt().to", "(1 - beta2**count).to"),
            ("square.sqrt() / root_bias + eps", "(square.sqrt() + eps) / root_bias", EPS),
            ("t.add_(go.to(t.dtype))", "t.add_(1)"),
            ("v.copy_(torch.where(go, square.to(v.dtype), v))", "v.copy_(square.to(v.dtype))"),
        ],
    ),
    (
        REFERENCE + "rho.py",
        RHO.format("reference"),
        [
            ("h.double().square() * unit", "h.double() * unit"),
            ("t * dual(scaled.double(), q))", "dual(scaled.double(), q))"),
            ("(t * dual(scaled, q)).double()", "dual(scaled, q).double()"),
            ("h.double() - g.double()", "h.double() + g.double()"),
            ("a.double() - b.double()", "b.double() - a.double()"),
        ],
    ),
    (
        MATH,
        NORM.format("cpu"),
        [
            ("return magnitude + xi;", "return magnitude;"),
            ("magnitude < 0x400u ? subnormal", "magnitude < 0x1u ? subnormal", TWO_BYTES),
        ],
    ),
    (
        MATH,
        PERTURB.format("cpu"),
        [
            ("return sign * power(absolute(x), q - C(1));", "return power(absolute(x), q - C(1));"),
            ("if (q == C(1)) return sign;", "if (q == C(1)) return sign * sign;"),
            ("C(q == 2 ? rho / square_root(total) : rho)", "C(q == 2 ? rho / total : rho)"),
            ("C(1 / power(total, 1 / q))", "C(1 / square_root(total))"),
            ("if (!(total > 0) || !is_finite(total))", "if (!is_finite(total))"),
            ("if (!(total > 0) || !is_finite(total))", "if (!(total > 0))"),
            ("if (!is_finite(double(length)) || !is_finite(double(shrink)))", "if (!is_finite(double(shrink)))"),
            ("(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "(bits + 0x8000u) >> 16", TWO_BYTES),
            ("0xfffu + ((magnitude >> 13) & 1u)", "0x1000u", TWO_BYTES),
        ],
    ),
    (
        MATH,
        STEP.format("cpu"),
        [
            ("*m = o.momentum * *m + g;", "*m = o.momentum * (*m + g);"),
            ("g = o.nesterov ? g + o.momentum * *m : *m;", "g = *m;"),
            ("return o.lr == 0 ? theta : theta - o.lr * g;", "return theta - o.lr * g;"),
            ("return o.lr == 0 ? theta : theta - o.lr * g;", "return o.lr == 0 ? theta : theta + o.lr * g;"),
            ("theta = theta * o.shrink;", "theta = theta;"),
            ("m = m + o.one_minus_beta1 * (g - m);", "m = m + o.beta1 * (g - m);"),
            ("v = o.beta2 * v + o.one_minus_beta2 * (g * g);", "v = o.beta2 * v + o.one_minus_beta2 * g;"),
            ("(square_root(v) / o.root_bias + o.eps)", "((square_root(v) + o.eps) / o.root_bias)", EPS),
            ("return 1 - power(beta, step);", "return 1 - power(beta, step + 1);"),
            ("C(square_root(bias2)),", "C(bias2),"),
            ("C(1 - o.lr * o.weight_decay)", "C(1 - o.weight_decay)"),
            ("o.decoupled ? C(0) : C(o.weight_decay)", "C(o.weight_decay)"),
        ],
    ),
    (
        MATH,
        RHO.format("cpu"),
        [
            ("return outer * (g_hat * g_hat) * unit;", "return outer * g_hat * unit;"),
            ("return outer * (g_hat - g);", "return outer * (g_hat + g);"),
        ],
    ),
    (
        "csrc/schemas.h",
        "tests/test_opcheck.py -k 'restore_sgd_ and (opcheck or schema)'",
        [
            ("Tensor(b!)[] momenta, Tensor saved", "Tensor[] momenta, Tensor saved"),
        ],
    ),
    (
        "lets_kernels/hypergradient.py",
        "tests/test_hypergradient.py -k 'reference and rounding'",
        [
            ("out.append(-self.lr[k] * a.bucket", "out.append(self.lr[k] * a.bucket"),
            ("out.append(-self.lr[k] * length * share)", "out.append(-length * share)"),
            ("out.append(-self.lr[k] * length * share)", "out.append(-self.lr[k] * share)"),
            ("near.pow((a.q - 1) / a.q)", "near.pow(1 / a.q)", "tests/test_methods.py -k every_direction"),
            ("a.total(saved=True)", "a.total()"),
            ("(self.stepped[k], self.first[k])", "(self.perturbed[k], self.first[k])", "tests/test_parts.py"),
            (
                "own(self.perturbed), stepped=own(self.stepped)",
                "self.perturbed, stepped=self.stepped",
                "tests/test_hazards.py",
            ),
        ],
    ),
    (
        "lets_kernels/direction.py",
        DIRECTED,
        [
            ("else p / (p - 1)", "else p"),
            ("return [self.bucket.saved] if saved else self.runs.weights", "return self.runs.weights"),
            ("return 1 if id(p) in self._transposed else 0", "return 0"),
            (
                'bias = p.dim() <= 1 if name is None else "weight" not in name',
                "bias = p.dim() <= 1",
                "tests/test_contract.py -k bias",
            ),
            ("if not self.filterwise or p.dim() < 3", "if not self.filterwise or p.dim() < 2"),
            ("math.isfinite(xi) and xi >= 0", "xi >= 0", "tests/test_errors.py"),
        ],
    ),
    (
        "lets_kernels/learned.py",
        LEARNED,
        [
            ("losses[0] - losses[1] if self.metric", "losses[1] - losses[0] if self.metric"),
            ("[weight * s for s in means", "[s for s in means"),
            (".all() * trial.gate", ".all()", "tests/test_finite.py -k 'reference and learned'"),
            (
                "torch.isfinite(torch.stack(gradients)).all() * trial.gate",
                "trial.gate",
                "tests/test_finite.py -k 'reference and learned'",
            ),
            ("(step + 1) % self.interval == 0", "step % self.interval == 0"),
            ('None if self.metric == "validation_loss" else train', "train"),
            ("d / nu.detach().exp() for d", "d for d"),
            ("trial.detached(), val, val_loss", "trial, val, val_loss", "tests/test_hazards.py"),
        ],
    ),
    (
        "lets_kernels/optimizers/step.py",
        "tests/test_finite.py -k reference",
        [
            ("flags = [*means[:1], *self.totals]", "flags = self.totals"),
            ("flags = [*means[:1], *self.totals]", "flags = means[:1]"),
            ("total.pow(1 / self.optimizer.direction.q)", "total.sqrt()", "tests/test_parts.py"),
            (RESTORING, "            pass\n        self"),
            ("if self.is_perturbed and second[a.bucket.index].indices != a.runs.indices:", "if False:"),
        ],
    ),
    (
        "lets_kernels/optimizers/sam.py",
        "tests/test_faults.py -k reference",
        [
            ("if self._step is not None and self._step.torn:", "if False:"),
        ],
    ),
    (
        "lets_kernels/optimizers/base.py",
        "tests/test_hazards.py tests/test_contract.py -k 'not cpu'",
        [
            ("any(getattr(g, _SEEN, None) != version(g) for g in self._gradients())", "bool(self._gradients())"),
        ],
    ),
    (
        "lets_kernels/guarded.py",
        "tests/test_guarded.py",
        [
            ("if gate.item() != 0:", "if True:"),
            ("torch.where(closed[t.device], old, t)", "t"),
        ],
    ),
    (
        "lets_kernels/distributed.py",
        "tests/test_distributed.py",
        [
            ("return reduced / count", "return reduced"),
            ("dist.all_reduce(reduced, group=group)", "pass"),
        ],
    ),
]

MUTANTS = [
    Mutant(file, text, replacement, own[0] if own else tests)
    for file, tests, pairs in GROUPS
    for text, replacement, *own in pairs
]
