"""How long does the host work in a step? 161 tensors of 16 elements, so that the kernels have next to nothing to do.

The gradients come from a backward in every round, as in training: Python sees each of them for the first time.
"""

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
from lets_kernels.bench.shapes import normal

pytest.importorskip("lets_kernels.ops.native", reason="the compiled extension is what is measured here")

pytestmark = pytest.mark.benchmark(timer=CLOCK)
ROUNDS_FACTOR = 20  # a round takes microseconds
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
#: What is aimed at, as multiples of the foreach step with swapped pointers.
AIMED = {"lets_kernels": 0.5, "lets_kernels, flatten=True": 0.2}


def test_host(benchmark, rounds, report):
    def base(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, **SGD, fused=True)

    def ours(**options: Any) -> tuple[list[Tensor], Any]:
        params = weights()
        return params, SAM(params, torch.optim.SGD, rho=0.05, **SGD, **options)

    def theirs(kind: Callable[..., Any]) -> tuple[list[Tensor], Any]:
        params = weights()
        return params, kind(params, base, 0.05)

    def weights() -> list[Tensor]:
        return [p.requires_grad_() for p in normal(TINY, 0.02, 0)]

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
    first, second = normal(TINY, 0.01, 1), normal(TINY, 0.01, 2)

    runs = {name: host_step(*contender, first, second) for name, contender in contenders.items()}
    for run in runs.values():
        run()
    for name, (params, _) in contenders.items():
        assert error(params, contenders["per tensor"][0]) < 1e-5, name

    timings = interleaved(benchmark, "lets_kernels", runs, rounds * ROUNDS_FACTOR, warmup=20)
    table = report("host", "Host time of a whole SAM + SGD step: 161 tensors of 16 elements")
    for name, t in timings.items():
        micro = {q: t.quantile(q) * 1e6 for q in (0.2, 0.5, 0.8)}
        row = {"contender": name, "us": f"{micro[0.5]:.0f}", "p20 - p80": f"{micro[0.2]:.0f} - {micro[0.8]:.0f}"}
        row["takes"] = f"{t.over(timings['lets_kernels']):.2f}x"
        if name in AIMED:
            times = t.over(timings["foreach, swapped"])
            verdict = "disturbed" if t.disturbed else "reached" if times <= AIMED[name] else "missed"
            row["aim"] = f"{times:.2f}x swapped: {verdict} (<= {AIMED[name]}x)"
        kept = {"median_us": micro[0.5], "p20_us": micro[0.2], "p80_us": micro[0.8], "rounds": len(t.seconds)}
        table.add(row, contender=name, disturbed=t.disturbed, **{k: round(v, 2) for k, v in kept.items()})
