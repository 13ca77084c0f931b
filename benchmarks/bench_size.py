"""How does a step compare with eager code as tensors outgrow the caches? 25.6 M elements in 160, 4 and 1 tensors.

A per-tensor loop keeps its temporaries in the last-level cache as long as a tensor fits there, and moves them through
memory where it does not; the fused passes move the same bytes either way.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import interleaved, ms
from lets_kernels import SAM
from lets_kernels.bench import eager
from lets_kernels.bench.clock import CLOCK
from lets_kernels.bench.compare import error
from lets_kernels.bench.shapes import normal

pytest.importorskip("lets_kernels.ops.native", reason="the compiled extension is what is measured here")

pytestmark = pytest.mark.benchmark(timer=CLOCK)
ELEMENTS = 25_600_000
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}


@pytest.mark.parametrize("count", [160, 4, 1])
def test_size(count, benchmark, rounds, report):
    shapes = [(ELEMENTS // count,)] * count
    grads = normal(shapes, 0.01, 1), normal(shapes, 0.01, 2)

    def weights() -> list[Tensor]:
        return [p.requires_grad_() for p in normal(shapes, 0.02, 0)]

    def base(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, **SGD, fused=True)

    def step(params: list[Tensor], optimizer: Any) -> Callable[[], None]:
        def run() -> None:
            for given, half in zip(grads, (optimizer.first_step, optimizer.second_step), strict=True):
                with CLOCK.stopped():
                    for p, g in zip(params, given, strict=True):
                        p.grad = g
                half()

        return run

    def made(kind: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[list[Tensor], Any]:
        params = weights()
        return params, kind(params, *arguments, **options)

    contenders = {
        "lets_kernels": made(SAM, torch.optim.SGD, rho=0.05, **SGD),
        "per tensor": made(eager.PerTensor, base, 0.05),
        "foreach": made(eager.Foreach, base, 0.05),
    }
    runs = {name: step(*contender) for name, contender in contenders.items()}
    for run in runs.values():
        run()
    for name, (params, _) in contenders.items():
        assert error(params, contenders["lets_kernels"][0]) < 1e-5, name

    timings = interleaved(benchmark, "lets_kernels", runs, rounds)
    table = report("size", "A whole SAM + SGD step over 25.6 M elements, by the number of tensors they are in")
    for name, t in timings.items():
        ratio = t.over(timings["lets_kernels"])
        row = {"tensors": str(count), "contender": name, "ms": ms(t.median), "takes": f"{ratio:.2f}x"}
        table.add(row, tensors=count, contender=name, **t.summary(), disturbed=t.disturbed, ratio=round(ratio, 3))
