"""What do param groups cost the host? Tensors of 16 elements in one group, in 28 and in a group each; every group has a
learning rate and a weight decay of its own. ``python -m lets_kernels bench --full`` asks the same of larger tensors.

Beside ours stands the strongest eager code: torch's fused optimizer on the same groups, after a foreach perturbation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import host_step, interleaved
from lets_kernels.bench import eager
from lets_kernels.bench.clock import CLOCK
from lets_kernels.bench.contenders import ADAMW, SGD, ours
from lets_kernels.bench.shapes import normal

pytest.importorskip("lets_kernels.ops.native", reason="the compiled extension is what is measured here")

pytestmark = pytest.mark.benchmark(timer=CLOCK)
ROUNDS_FACTOR = 10  # a round takes microseconds
CASES = [(161, 1), (161, 28), (161, 161), (465, 1), (465, 465)]  # tensors, groups
CONTENDERS = {"lets": ours(), "eager": eager.ForeachSwap}
#: Promised for ours: times one group of as many tensors.
PROMISED = {28: 1.3, 465: 2.0}


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=lambda base: base.name)
def test_groups(base, benchmark, rounds, report):
    def make(name: str, tensors: int, count: int) -> tuple[list[Tensor], Any]:
        params = [p.requires_grad_() for p in normal([(16,)] * tensors, 0.02, 0)]
        return params, CONTENDERS[name](params, dataclasses.replace(base, groups=count), 0.05)

    def step(params: list[Tensor], optimizer: Any) -> Callable[[], None]:
        return host_step(params, optimizer, *(normal([(16,)] * len(params), 0.01, seed) for seed in (1, 2)))

    made = {(name, *case): make(name, *case) for case in CASES for name in CONTENDERS}
    runs = {key: step(*contender) for key, contender in made.items()}
    for run in runs.values():
        run()
    for tensors, count in CASES:
        for p, q in zip(made["lets", tensors, count][0], made["eager", tensors, count][0], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # one step, in float32

    labels = {key: f"{key[0]}, {key[1]} tensors in {key[2]} groups" for key in made}
    # What pytest-benchmark times comes after all others and after its own setup; nothing is compared with it.
    contenders = {"last": step(*make("lets", *CASES[0])), **{labels[key]: run for key, run in runs.items()}}
    timings = interleaved(benchmark, "last", contenders, rounds * ROUNDS_FACTOR, 10)
    table = report("groups", "Host time of a whole step by the number of param groups: tensors of 16 elements")
    for name, tensors, count in made if timings else ():
        t, one = timings[labels[name, tensors, count]], timings[labels[name, tensors, 1]]
        who, many = "lets_kernels" if name == "lets" else "foreach, swapped", t.over(one)
        row = {"base": base.name, "contender": who, "tensors": str(tensors), "groups": str(count)}
        row |= {"us": f"{t.quantile(0.5) * 1e6:.0f}", "of one group": f"{many:.2f}x"}
        if name == "lets" and count in PROMISED:
            verdict = "disturbed" if t.disturbed else "pass" if many <= PROMISED[count] else "FAIL"
            row["target"] = f"{verdict} (<= {PROMISED[count]}x)"
        what = {"base": base.name, "contender": who, "tensors": tensors, "groups": count, "disturbed": t.disturbed}
        table.add(row, **what, median_us=round(t.quantile(0.5) * 1e6, 2), over_one_group=round(many, 3))
