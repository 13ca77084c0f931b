"""How long does the host work in a step? On tensors so small that the kernels have next to nothing to do: 161 of 16
elements, and the twelve of the demo's network for handwritten digits.

The gradients come from a backward in every round, as in training: Python sees each of them for the first time.
"""

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import TINY, host_step, interleaved
from lets_kernels import SAM
from lets_kernels.bench import eager
from lets_kernels.bench.clock import CLOCK
from lets_kernels.bench.compare import error
from lets_kernels.bench.shapes import Shape, normal
from lets_kernels.demo.model import small_cnn
from lets_kernels.ops import native
from lets_kernels.parts.direction import Ascent
from lets_kernels.space.buckets import Bucket, Runs
from lets_kernels.space.layout import ParameterSpace
from lets_kernels.step import step as of_a_step
from lets_kernels.step.engine import Engine
from lets_kernels.step.step import Step

pytestmark = pytest.mark.benchmark(timer=CLOCK)
ROUNDS_FACTOR = 20  # a round takes microseconds
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
#: The shapes of each question; and what is aimed at, as multiples of the foreach step with swapped pointers.
CASES: dict[str, tuple[str, list[Shape], dict[str, float]]] = {
    "host": ("161 tensors of 16 elements", TINY, {"lets_kernels": 0.5, "lets_kernels, flatten=True": 0.2}),
    "host_digits": (
        "the 12 tensors of the demo's network",
        [tuple(p.shape) for p in small_cnn().parameters()],
        {"lets_kernels": 0.8},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_host(benchmark, rounds, report, case):
    what, shapes, aimed = CASES[case]

    def base(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, **SGD, fused=True)

    def ours(**options: Any) -> tuple[list[Tensor], Any]:
        params = weights()
        return params, SAM(params, torch.optim.SGD, rho=0.05, **SGD, **options)

    def theirs(kind: Callable[..., Any]) -> tuple[list[Tensor], Any]:
        params = weights()
        return params, kind(params, base, 0.05)

    def weights() -> list[Tensor]:
        return [p.requires_grad_() for p in normal(shapes, 0.02, 0)]

    contenders = {
        "lets_kernels": ours(),
        "lets_kernels, check_finite=False": ours(check_finite=False),
        "lets_kernels, flatten=True": ours(flatten=True),
        "lets_kernels, flatten=True, check_finite=False": ours(flatten=True, check_finite=False),
        "lets_kernels, backend='foreach'": ours(backend="foreach"),
        "lets_kernels, backend='foreach', check_finite=False": ours(backend="foreach", check_finite=False),
        "lets_kernels, backend='reference'": ours(backend="reference"),
        "per tensor": theirs(eager.PerTensor),
        "foreach": theirs(eager.Foreach),
        "foreach, swapped": theirs(eager.ForeachSwap),
    }
    first, second = normal(shapes, 0.01, 1), normal(shapes, 0.01, 2)

    runs = {name: host_step(*contender, first, second) for name, contender in contenders.items()}
    for run in runs.values():
        run()
    for name, (params, _) in contenders.items():
        assert error(params, contenders["per tensor"][0]) < 1e-5, name

    timings = interleaved(benchmark, "lets_kernels", runs, rounds * ROUNDS_FACTOR, warmup=20)
    table = report(case, f"Host time of a whole SAM + SGD step: {what}")
    for name, t in timings.items():
        micro = {q: t.quantile(q) * 1e6 for q in (0.2, 0.5, 0.8)}
        row = {"contender": name, "us": f"{micro[0.5]:.0f}", "p20 - p80": f"{micro[0.2]:.0f} - {micro[0.8]:.0f}"}
        row["takes"] = f"{t.over(timings['lets_kernels']):.2f}x"
        swapped = t.over(timings["foreach, swapped"])
        row["of swapped"] = f"{swapped:.2f}x"
        if name in aimed:
            verdict = "disturbed" if t.disturbed else "reached" if swapped <= aimed[name] else "missed"
            row["aim"] = f"{verdict} (<= {aimed[name]}x)"
        kept = {
            "median_us": micro[0.5],
            "p20_us": micro[0.2],
            "p80_us": micro[0.8],
            "rounds": len(t.seconds),
            "of_swapped": swapped,
        }
        table.add(row, contender=name, disturbed=t.disturbed, **{k: round(v, 2) for k, v in kept.items()})


#: What a step is made of, each without what stands inside it: (owner, function, phase).
PHASES: list[tuple[Any, str, str]] = [
    (ParameterSpace, "is_current", "are the tables still those of the parameters"),
    (Bucket, "gather", "read the gradients, and where the parameters lie"),
    (Runs, "pack", "pack addresses"),
    (Bucket, "pack", "pack addresses"),
    (native, "grad_norm", "op: norm, and the finite check"),
    (native, "all_finite_", "op: norm, and the finite check"),
    (native, "perturb_", "op: perturb"),
    (native, "restore_sgd_", "op: restore and step"),
    (Runs, "write_back", "tell autograd of the writes"),
    (of_a_step, "prepared", "find the base optimizer's state and options"),
    (Ascent, "perturb", "perturb, beside its op"),
    (Step, "prepare", "the perturbation: schedule, direction, radius"),
    (Step, "metrics", "numbers for metrics()"),
    (Engine, "mark_gradients", "mark which gradients were used"),
    (Engine, "begin", "the rest of first_step()"),
    (Engine, "finish", "the rest of second_step()"),
    (SAM, "first_step", "torch's wrappers of an optimizer's methods"),
    (SAM, "second_step", "torch's wrappers of an optimizer's methods"),
]


class Stopwatch:
    """Times functions by phase; while one runs inside another, only its own phase counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys((phase for _, _, phase in PHASES), 0.0)
        self._running: list[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        now = CLOCK()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def around(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._running.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._running.pop()

        return timed


def test_phases(monkeypatch, rounds, report):
    """Where the host's time goes. The stopwatch itself takes part of it: the shares count, not their sum."""
    table = report("host_phases", "Host time of a SAM + SGD step by phase, in us: 161 tensors of 16 elements, and one")
    found: list[dict[str, float]] = []
    for shapes in (TINY, TINY[:1]):
        params = [p.requires_grad_() for p in normal(shapes, 0.02, 0)]
        optimizer = SAM(params, torch.optim.SGD, rho=0.05, **SGD)
        watch = Stopwatch()
        with monkeypatch.context() as patch:
            for owner, name, phase in PHASES:
                patch.setattr(owner, name, watch.around(getattr(owner, name), phase))
            run = host_step(params, optimizer, normal(shapes, 0.01, 1), normal(shapes, 0.01, 2))
            each: list[dict[str, float]] = []
            for _ in range(20 + rounds * ROUNDS_FACTOR):
                watch.seconds = dict.fromkeys(watch.seconds, 0.0)
                run()
                each.append(watch.seconds)
        assert int(optimizer.metrics()["gradients"]) == 2 * len(each)
        found.append({phase: 1e6 * statistics.median(one[phase] for one in each[20:]) for phase in watch.seconds})
    for phase, micro in sorted(found[0].items(), key=lambda item: -item[1]):
        one = found[1][phase]
        table.add(
            {"phase": phase, "161 tensors": f"{micro:.0f}", "one": f"{one:.0f}"},
            phase=phase,
            median_us=round(micro, 1),
            median_us_of_one=round(one, 1),
        )
        assert micro > 0
