"""What all benchmarks share: the tensors, the byte floors, the clock, interleaved timing, and the tables of results."""

import dataclasses
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lets_kernels.bench.clock import CLOCK, Others, Timing, threads
from lets_kernels.bench.shapes import Shape, numel, resnet50
from lets_kernels.demo.model import small_cnn
from lets_kernels.ops.declared import ELEMENT_WISE, OPS, Op

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PROMISED_SHARE = 0.85  # of a non-temporal copy, for every op (docs: numbers to hold)


# ---- the tensors -----------------------------------------------------------------------------------------------------


SHAPES = resnet50()
TINY: list[Shape] = [(16,)] * len(SHAPES)  # so small that only the host's work shows
NUMEL = numel(SHAPES)


def combine(pairs: Sequence[tuple[float, Sequence[Tensor]]]) -> list[Tensor]:
    """Σ a x, tensor by tensor."""
    rows = zip(*(xs for _, xs in pairs), strict=True)
    return [sum((a * x for (a, _), x in zip(pairs, row, strict=True)), torch.zeros_like(row[0])) for row in rows]


# ---- the byte floors -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Floor:
    """What an op cannot avoid moving, as it is declared."""

    op: Op

    def bytes(self, table: Tensor, itemsize: int) -> int:
        numel, filter_length = table[:, 1], table[:, 2]
        lists, masks = map(len, self.op.moved)
        moved = lists * numel + len(self.op.element_wise) * numel * (filter_length == ELEMENT_WISE)
        moved = itemsize * (moved + len(self.op.filter_wise) * numel * (filter_length > ELEMENT_WISE))
        return int((moved + masks * numel).sum())


FLOORS = {op.name: Floor(op) for op in OPS if any(a.name == "table" for a in op.arguments)}


# ---- timing ----------------------------------------------------------------------------------------------------------


BUDGET, LEAST_ROUNDS = 8.0, 5
THREADS = torch.get_num_threads()  # while timing; what goes before has one, which a busy machine delays least
WAIT_FOR_QUIET = [0.0]  # seconds before each comparison; conftest.py sets it


def interleaved(
    benchmark: Any, ours: str, contenders: dict[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, Timing]:
    """Time all contenders in turn, A B C A B C …; pytest-benchmark keeps the statistics of ``ours``.

    On a busy machine there are fewer rounds than asked for, so that one comparison takes about ``BUDGET`` seconds.
    Empty where pytest-benchmark is disabled: everything has then run once.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}

    def others() -> None:
        for name, run in contenders.items():
            if name != ours:
                start = CLOCK()
                run()
                seconds[name].append(CLOCK() - start)

    Others.wait(WAIT_FOR_QUIET[0])
    with threads(THREADS):
        elsewhere = Others()
        start = time.perf_counter()
        for run in contenders.values():
            run()
        rounds = max(LEAST_ROUNDS, min(rounds, int(BUDGET / (time.perf_counter() - start))))
        benchmark.pedantic(contenders[ours], setup=others, rounds=rounds, warmup_rounds=warmup)
        busy = elsewhere.cores()
    if benchmark.stats is None:
        return {}
    seconds[ours] = benchmark.stats.stats.data
    return {name: Timing(tuple(values[-rounds:]), busy) for name, values in seconds.items()}


def host_step(params: list[Tensor], optimizer: Any, first: list[Tensor], second: list[Tensor]) -> Callable[[], None]:
    """A step whose gradients come from a backward that is not timed: Python sees each of them for the first time.

    As in training, forward and backward of a network lie before each half, not timed: what a half needs of code and
    data has left the nearest caches, for every contender alike.
    """
    network, batch = small_cnn(), torch.randn(16, 1, 8, 8)

    def run() -> None:
        for grads, half in ((first, optimizer.first_step), (second, optimizer.second_step)):
            with CLOCK.stopped():
                for p in params:
                    p.grad = None
                torch.autograd.backward(params, grads)
                network(batch).sum().backward()
            half()

    return run


# ---- results ---------------------------------------------------------------------------------------------------------


class Report:
    """The results of one file: rows to print, and the same with everything else for the JSON file."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.rows: list[dict[str, Any]] = []
        self.printed: list[dict[str, str]] = []
        self.notes: list[str] = []

    def add(self, printed: dict[str, str], **kept: Any) -> None:
        self.printed.append(printed)
        self.rows.append(kept)

    def text(self) -> str:
        columns = list(dict.fromkeys(name for row in self.printed for name in row))
        cells = [columns, *([row.get(name, "") for name in columns] for row in self.printed)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        left = [not any(re.match(r"[\d.]+", row[i]) for row in cells[1:]) for i in range(len(columns))]
        lines = []
        for row in cells:
            aligned = (c.ljust(w) if at else c.rjust(w) for c, w, at in zip(row, widths, left, strict=True))
            lines.append("  ".join(aligned).rstrip())
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([self.title, *lines, *self.notes])

    @property
    def disturbed(self) -> bool:
        return any(row.get("disturbed") for row in self.rows)

    def save(self, name: str, machine: dict[str, Any]) -> Path:
        """Write ``results/<name>-<cpu>-<threads>-threads.json``."""
        slug = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
        path = RESULTS / f"{name}-{slug}-{machine['threads']}-threads.json"
        RESULTS.mkdir(exist_ok=True)
        quiet = [row for row in self.rows if not row.get("disturbed")]
        content = {"question": self.title, "environment": machine, "results": quiet, "notes": self.notes}
        content["left_out_as_disturbed"] = len(self.rows) - len(quiet)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return path


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def verdict(value: float, target: float, disturbed: bool) -> str:
    """Whether a ratio reaches its target; no verdict where other processes took part."""
    return f"{'disturbed' if disturbed else 'pass' if value >= target else 'FAIL'} (>= {target:g}x)"
