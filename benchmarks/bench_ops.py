"""How close is each op to the memory's speed, and how far from eager PyTorch? ResNet-50's 161 tensors.

GB/s counts the bytes that the op cannot avoid moving (``common.FLOORS``), and the share is that of a copy around the
caches in the same rounds. An alternative whose results differ from the reference backend's is not timed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import eager_radius
from benchmarks.common import FLOORS, NUMEL, PROMISED_SHARE, SHAPES, Report, combine, interleaved, ms, verdict
from lets_kernels.bench import eager
from lets_kernels.bench.clock import CLOCK
from lets_kernels.bench.compare import error
from lets_kernels.bench.shapes import normal
from lets_kernels.ops import reference
from lets_kernels.parts.direction import Adaptive, Direction, Gradient
from lets_kernels.space.buckets import Bucket, Member

native = pytest.importorskip("lets_kernels.ops.native", reason="the compiled extension is what is measured here")

pytestmark = pytest.mark.benchmark(timer=CLOCK)
RHO, XI = 5.0, 0.01  # a radius so large that an error in the perturbation shows in the weights
LR, MOMENTUM, DECAY, BETAS, EPS = 0.1, 0.9, 1e-4, (0.9, 0.999), 1e-8
# Against the reference, element by element: a few roundings of the arithmetic type; sums in float32 and products in
# bfloat16 for eager PyTorch.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7}
EAGER_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
RHO_GRAD_TARGET = 10.0
DIRECTIONS: dict[str, Callable[[], Direction]] = {
    "plain": Gradient,
    "adaptive": lambda: Adaptive(XI),
    "filter-wise": lambda: Adaptive(XI, filterwise=True),
}


@dataclass
class Contender:
    run: Callable[[], Any]
    result: Callable[[], Sequence[Tensor]]


class Work:
    """What the ops work on, for one dtype and direction; gradients are shared, what is written is each one's own."""

    def __init__(self, dtype: torch.dtype, direction: str) -> None:
        self.direction, self.dtype = direction, dtype
        self.params = normal(SHAPES, 0.02, 0, dtype)
        self.g = normal(SHAPES, 0.01, 1, dtype)
        part = DIRECTIONS[direction]()
        options = {"adaptive": True, "xi": XI}
        members = [Member(p, None, 0, place) for place, p in enumerate(self.params)]
        self.bucket = Bucket(members, 0, [options], part.geometry, "cpu", False)
        self.table = self.bucket.table(tuple(range(len(self.params))))
        self.norms = self.bucket.filter_norms
        if self.norms is not None:
            reference.filter_norms(self.params, self.table, self.norms)
        self.weights = self.params if self.bucket.element_wise else []
        self.total = reference.grad_norm(self.g, self.weights, self.table, self.norms, XI, 2.0)
        self.rho = torch.tensor(RHO, dtype=torch.float64)
        self.gate = torch.ones((), dtype=torch.float64)
        self.norm = math.sqrt(self.total.item())

    @functools.cached_property
    def radius_gradients(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """ḡ_vl, ḡ_tr and ĝ so correlated that neither radius gradient is a sum of noise."""
        noise = [normal(SHAPES, 0.01, seed, self.dtype) for seed in (2, 3, 4)]
        gap = combine([(0.5, self.g), (1, noise[0])])
        val, perturbed = combine([(1, noise[1]), (1, gap)]), combine([(1, self.g), (0.3, gap), (0.1, noise[2])])
        return val, noise[1], perturbed

    def scale(self, p: Tensor) -> Tensor | float:
        """T of one parameter, as eager code writes it."""
        if self.direction == "plain":
            return 1.0
        if self.direction == "filter-wise" and p.dim() > 2:
            return p.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + XI
        return p.abs() + XI

    def scales(self) -> list[Tensor]:
        """T of all parameters, with foreach where it can be."""
        if self.direction == "filter-wise":
            return [torch.as_tensor(self.scale(p)) for p in self.params]
        found = torch._foreach_abs(self.params)
        torch._foreach_add_(found, XI)
        return list(found)

    def own(self) -> "Own":
        return Own(self)


def flat(tensors: Sequence[Tensor], work: Work) -> Tensor:
    """The tensors in one buffer, as the ops keep them; zeros between."""
    buffer = torch.zeros(work.bucket.size, dtype=work.dtype)
    for (start, numel, *_), t in zip(work.table.tolist(), tensors, strict=True):
        buffer[start : start + numel] = t.flatten()
    return buffer


@functools.lru_cache(maxsize=1)
def work_for(dtype: torch.dtype, direction: str) -> Work:
    return Work(dtype, direction)


class Own:
    """What one contender writes: weights, saved weights (flat for the ops, a list for eager code), averages."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.params = [p.clone() for p in work.params]
        self.dirty = torch.ones((), dtype=torch.int64)

    @functools.cached_property
    def old(self) -> list[Tensor]:
        return [p + g for p, g in zip(self._work.params, self._work.g, strict=True)]

    @functools.cached_property
    def saved(self) -> Tensor:
        return flat(self.old, self._work)

    @functools.cached_property
    def m(self) -> list[Tensor]:
        return [0.5 * g for g in self._work.g]

    @functools.cached_property
    def v(self) -> list[Tensor]:
        return [g.square() for g in self._work.g]

    @functools.cached_property
    def steps(self) -> list[Tensor]:
        return [torch.tensor(10.0) for _ in self.params]

    def optimizer(self, work: Work, kind: type[torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
        """An optimizer over these weights that continues from these averages."""
        optimizer = kind(self.params, **options)
        for i, p in enumerate(self.params):
            p.grad = work.g[i]
            adam = {"exp_avg": self.m[i], "exp_avg_sq": self.v[i], "step": self.steps[i]}
            optimizer.state[p].update({"momentum_buffer": self.m[i]} if kind is torch.optim.SGD else adam)
        return optimizer


# ---- the ops: the call under measurement, through either backend, and what eager code does instead -------------------


def scalar_contender(function: Callable[[], Tensor]) -> Contender:
    return Contender(function, lambda: [function()])


def grad_norm(w: Work) -> dict[str, Contender]:
    def ours(module: Any) -> Contender:
        return scalar_contender(lambda: module.grad_norm(w.g, w.weights, w.table, w.norms, XI, 2.0))

    def loop() -> Tensor:
        if w.direction == "plain":
            return eager.total_norm(w.g).square()
        return eager.total_norm([w.scale(p) * g for p, g in zip(w.params, w.g, strict=True)]).square()

    def foreach() -> Tensor:
        scaled = w.g if w.direction == "plain" else torch._foreach_mul(w.scales(), w.g)
        return eager.foreach_total_norm(scaled).square()

    return {
        "reference": ours(reference),
        "ours": ours(native),
        "loop": scalar_contender(loop),
        "foreach": scalar_contender(foreach),
    }


def filter_norms(w: Work) -> dict[str, Contender]:
    assert w.norms is not None

    def ours(module: Any) -> Contender:
        out = torch.full_like(w.norms, math.nan)
        return Contender(lambda: module.filter_norms(w.params, w.table, out), lambda: [out])

    def loop() -> Tensor:
        return torch.cat([p.flatten(1).norm(dim=1) for p in w.params if p.dim() > 2])

    return {"reference": ours(reference), "ours": ours(native), "loop": scalar_contender(loop)}


def perturb_(w: Work) -> dict[str, Contender]:
    def ours(module: Any) -> Contender:
        o = w.own()
        arguments = (o.params, w.g, o.saved, o.dirty, w.table, w.norms, XI, 2.0, w.total, w.rho)
        return Contender(lambda: module.perturb_(*arguments), lambda: [*o.params, o.saved])

    o, f = w.own(), w.own()
    factor = torch.tensor(RHO / w.norm)

    def loop() -> None:
        for i, (p, g) in enumerate(zip(o.params, w.g, strict=True)):
            o.old[i] = p.clone()
            e_w = w.scale(p) ** 2 * g * factor.to(p)
            p.add_(e_w)

    def foreach() -> None:
        if w.direction == "plain":
            torch._foreach_copy_(f.old, f.params)
            torch._foreach_add_(f.params, w.g, alpha=RHO / w.norm)
        else:
            scales = [torch.as_tensor(w.scale(p)) for p in f.params]
            scaled = torch._foreach_mul(scales, w.g)
            torch._foreach_copy_(f.old, f.params)
            torch._foreach_addcmul_(f.params, scaled, scales, RHO / w.norm)

    return {
        "reference": ours(reference),
        "ours": ours(native),
        "loop": Contender(loop, lambda: [*o.params, flat(o.old, w)]),
        "foreach": Contender(foreach, lambda: [*f.params, flat(f.old, w)]),
    }


def restore_(w: Work) -> dict[str, Contender]:
    def ours(module: Any) -> Contender:
        o = w.own()

        def run() -> None:
            o.dirty.fill_(1)
            module.restore_(o.params, o.saved, o.dirty, w.table)

        return Contender(run, lambda: o.params)

    o = w.own()

    def loop() -> None:
        for p, old in zip(o.params, o.old, strict=True):
            p.copy_(old)

    f = w.own()
    foreach = Contender(lambda: torch._foreach_copy_(f.params, f.old), lambda: f.params)
    return {
        "reference": ours(reference),
        "ours": ours(native),
        "loop": Contender(loop, lambda: o.params),
        "foreach": foreach,
    }


def step(
    w: Work, ours: Callable[[Any, Own], None], kind: type[torch.optim.Optimizer], **options: Any
) -> dict[str, Contender]:
    """The ops that restore within a base optimizer's step, against a restore and the optimizer itself."""

    def by(module: Any) -> Contender:
        o = w.own()
        return Contender(lambda: ours(module, o), lambda: [*o.params, *o.m])

    def loop(fused: bool) -> Contender:
        o = w.own()
        optimizer = o.optimizer(w, kind, **options, foreach=False, fused=fused)

        def run() -> None:
            if fused:
                torch._foreach_copy_(o.params, o.old)
            else:
                for p, old in zip(o.params, o.old, strict=True):
                    p.data = old
            optimizer.step()

        return Contender(run, lambda: [*o.params, *o.m])

    return {"reference": by(reference), "ours": by(native), "loop": loop(False), "foreach": loop(True)}


def restore_sgd_(w: Work) -> dict[str, Contender]:
    def ours(module: Any, o: Own) -> None:
        scalars = (LR, MOMENTUM, DECAY, False, False)
        module.restore_sgd_(o.params, w.g, o.m, o.saved, o.dirty, w.table, w.gate, *scalars)

    return step(w, ours, torch.optim.SGD, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)


def restore_adamw_(w: Work) -> dict[str, Contender]:
    def ours(module: Any, o: Own) -> None:
        scalars = (LR, *BETAS, EPS, DECAY, True, False)
        module.restore_adamw_(o.params, w.g, o.m, o.v, o.steps, o.saved, o.dirty, w.table, w.gate, *scalars)

    return step(w, ours, torch.optim.AdamW, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)


def rho_grad_diagonal(w: Work) -> dict[str, Contender]:
    val, train, perturbed = w.radius_gradients

    def ours(module: Any) -> Contender:
        lists = (val, train, perturbed, w.g, w.weights, w.table, w.norms, XI, 2.0)
        return scalar_contender(lambda: module.rho_grad_diagonal(*lists) / w.norm)

    def loop() -> Tensor:
        directions = eager_radius.unit_direction(w.g, [w.scale(p) for p in w.params])
        return eager_radius.rho_grad(val, train, perturbed, directions)

    def foreach() -> Tensor:
        return eager_radius.foreach_rho_grad(val, train, perturbed, w.g, None if w.direction == "plain" else w.scales())

    return {
        "reference": ours(reference),
        "ours": ours(native),
        "loop": scalar_contender(loop),
        "foreach": scalar_contender(foreach),
    }


def rho_grad_secant(w: Work) -> dict[str, Contender]:
    lists = (*w.radius_gradients, w.g)
    return {
        "reference": scalar_contender(lambda: reference.rho_grad_secant(*lists, w.table)),
        "ours": scalar_contender(lambda: native.rho_grad_secant(*lists, w.table)),
        "loop": scalar_contender(lambda: eager_radius.rho_grad_secant(*lists)),
        "foreach": scalar_contender(lambda: eager_radius.foreach_rho_grad_secant(*lists)),
    }


# ---- copies ----------------------------------------------------------------------------------------------------------


def both_copies() -> dict[str, Callable[[], object]]:
    """A copy around the caches, and torch's: reads N, writes N."""
    source, target = torch.randn(NUMEL), torch.empty(NUMEL)
    dirty, one_run = torch.ones((), dtype=torch.int64), torch.tensor([[0, NUMEL, -1, 0, 0]])

    def streamed() -> None:
        dirty.fill_(1)
        native.restore_([target], source, dirty, one_run)

    streamed()
    assert torch.equal(source, target)
    return {"streamed copy": streamed, "torch copy_": lambda: target.copy_(source)}


copies = pytest.fixture(scope="module")(both_copies)

PLAIN = [grad_norm, perturb_, restore_, restore_sgd_, restore_adamw_, rho_grad_diagonal, rho_grad_secant]
SCALED = [grad_norm, perturb_, rho_grad_diagonal]
CASES = [
    *[(op, "plain", torch.float32) for op in PLAIN],
    *[(op, "adaptive", torch.float32) for op in SCALED],
    *[(op, "filter-wise", torch.float32) for op in (filter_norms, *SCALED)],
    *[(op, "plain", torch.bfloat16) for op in (grad_norm, perturb_, restore_sgd_, rho_grad_secant)],
]


def name_of(value: Any) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else getattr(value, "__name__", value)


@pytest.mark.parametrize("op, direction, dtype", CASES, ids=name_of)
def test_op(op, direction, dtype, benchmark, copies, rounds, report):
    measure(op, direction, dtype, benchmark, copies, rounds, report, ("ops", "Each op"))


def measure(op, direction, dtype, benchmark, copies, rounds, report, heading):
    """Time one op and what eager code does instead, and add the row to the table of that name and title."""
    work = work_for(dtype, direction)
    with torch.no_grad():
        contenders = op(work)
        errors = {}
        expected = contenders.pop("reference")
        expected.run()
        results = expected.result()
        for name, contender in contenders.items():
            contender.run()
            errors[name] = error(contender.result(), results)
        del expected, results
        assert errors["ours"] <= TOLERANCE[dtype], f"differs from the reference: {errors['ours']:.1e}"
        right = {n: c.run for n, c in contenders.items() if n == "ours" or errors[n] <= EAGER_TOLERANCE[dtype]}
        timings = interleaved(benchmark, "ours", {**right, **copies}, rounds)
    if not timings:
        return

    ours, streamed = timings["ours"], timings["streamed copy"]
    moved = FLOORS[op.__name__].bytes(work.table, dtype.itemsize)
    bandwidth = moved / ours.median / 1e9
    # Bytes a second of ours over those of the copy, round by round.
    share = moved / FLOORS["restore_"].bytes(torch.tensor([[0, NUMEL, -1, 0, 0]]), 4) * streamed.over(ours)
    ratios = {name: timings[name].over(ours) for name in right if name != "ours"}
    kept = {
        "op": op.__name__,
        "direction": direction,
        "dtype": name_of(dtype),
        "disturbed": ours.disturbed,
        "bytes": moved,
        "GB/s": round(bandwidth, 2),
        "share_of_streamed_copy": round(share, 3),
        "share_of_torch_copy": round(share / streamed.over(timings["torch copy_"]), 3),
        "ratios": {name: round(r, 2) for name, r in ratios.items()},
        "errors": {name: float(f"{e:.1e}") for name, e in errors.items()},
        "timings": {name: t.summary() for name, t in timings.items()},
    }
    benchmark.extra_info.update({k: v for k, v in kept.items() if k != "timings"})

    def against(name: str) -> str:
        if name not in errors:
            return "-"
        return f"{ratios[name]:.1f}x" if name in ratios else f"wrong by {errors[name]:.0e}"

    table: Report = report(heading[0], f"{heading[1]}: ResNet-50's 161 tensors, 25.6 M elements")
    table.add(
        {
            "op": op.__name__,
            "direction": direction,
            "dtype": name_of(dtype),
            "ms": ms(ours.median),
            "p20 - p80": f"{ms(ours.quantile(0.2))} - {ms(ours.quantile(0.8))}",
            "MB": f"{moved / 1e6:.0f}",
            "GB/s": f"{bandwidth:.1f}",
            f"of copy ({PROMISED_SHARE:.0%})": f"{share:.0%}"
            + ("" if share >= PROMISED_SHARE or ours.disturbed else " low"),
            "of copy_": f"{kept['share_of_torch_copy']:.0%}",
            "per tensor": against("loop"),
            "foreach": against("foreach"),
            "target": verdict_of(op.__name__, ratios, ours.disturbed),
        },
        **kept,
    )


def verdict_of(op: str, ratios: dict[str, float], disturbed: bool) -> str:
    if op.startswith("rho_grad") and "loop" in ratios:
        return verdict(ratios["loop"], RHO_GRAD_TARGET, disturbed) + " per tensor"
    return "disturbed" if disturbed else ""
