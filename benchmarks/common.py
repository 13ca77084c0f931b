"""What all benchmarks share: the tensors, the byte floors, the clock, interleaved timing, and the tables of results."""

import dataclasses
import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lets_kernels
from lets_kernels import ops
from lets_kernels.ops.declared import ELEMENT_WISE, OPS, Op

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PROMISED_SHARE = 0.85  # of a non-temporal copy, for every op (docs: numbers to hold)
Shape = tuple[int, ...]


# ---- the tensors -----------------------------------------------------------------------------------------------------


def resnet50() -> list[Shape]:
    """Shapes of ResNet-50's 161 parameters (He et al., 2016; v1.5), 25,557,032 elements, in the order of the model."""

    def conv(out: int, inp: int, side: int) -> list[Shape]:
        return [(out, inp, side, side), (out,), (out,)]  # a convolution without bias, and its batch norm

    shapes, channels = conv(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(width, channels, 1) + conv(width, width, 3) + conv(4 * width, width, 1)
            shapes += conv(4 * width, channels, 1) if block == 0 else []
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


SHAPES = resnet50()
TINY: list[Shape] = [(16,)] * len(SHAPES)  # so small that only the host's work shows
NUMEL = sum(map(math.prod, SHAPES))


def normal(shapes: Sequence[Shape], sd: float, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Gaussian tensors, each in memory of its own, as a model's parameters and gradients are."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.empty(s).normal_(0, sd, generator=generator).to(dtype) for s in shapes]


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


# ---- validation ------------------------------------------------------------------------------------------------------


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest |found - expected| / max(|expected|, its rms in the tensor) over all elements; NaN counts as inf."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if b.numel() == 0:
            continue
        b = b.detach().double()
        scale = b.abs().clamp_(min=max(float(b.square().mean().sqrt()), 1e-300))
        difference = (a.detach() - b).abs_().div_(scale)
        worst = max(worst, float(difference.nan_to_num_(math.inf, math.inf).max()))
    return worst


# ---- timing ----------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds, and a way to leave out what is not to be timed."""

    def __init__(self) -> None:
        self._left_out = 0.0

    def __call__(self) -> float:
        return time.perf_counter() - self._left_out

    @contextmanager
    def stopped(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._left_out += time.perf_counter() - start


CLOCK = Clock()
BUDGET, LEAST_ROUNDS = 8.0, 5
THREADS = torch.get_num_threads()  # while timing; what goes before has one, which a busy machine delays least


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_seconds() -> tuple[float, float]:
    """CPU time used on this machine by all processes, and by this one; zeros where /proc does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0, 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:2])


class Others:
    """Cores that other processes keep busy. A thread that must wait for one of them makes any timing worthless."""

    LIMIT = 0.1  # of one core

    def __init__(self) -> None:
        self._start, self._before = time.perf_counter(), cpu_seconds()

    def cores(self) -> float:
        everyone, own = (now - then for now, then in zip(cpu_seconds(), self._before, strict=True))
        return max(0.0, everyone - own) / (time.perf_counter() - self._start)

    @classmethod
    def wait(cls, seconds: float) -> None:
        """Until they have been idle for two seconds, at most as long as this."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            others = cls()
            time.sleep(min(2.0, seconds))
            if others.cores() < cls.LIMIT:
                return


WAIT_FOR_QUIET = [0.0]  # seconds before each comparison; conftest.py sets it


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of every round, and the cores that other processes kept busy meanwhile."""

    seconds: tuple[float, ...]
    others: float

    @property
    def disturbed(self) -> bool:
        return self.others > Others.LIMIT

    def quantile(self, q: float) -> float:
        """In seconds, interpolated."""
        ordered = sorted(self.seconds)
        at = q * (len(ordered) - 1)
        low = int(at)
        return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: "Timing") -> float:
        """How many times as long as ``other`` this takes: the median over rounds, so that a slow minute cancels."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def summary(self) -> dict[str, float]:
        found = {"median_ms": self.median, "p20_ms": self.quantile(0.2), "p80_ms": self.quantile(0.8)}
        return {
            **{k: round(v * 1e3, 5) for k, v in found.items()},
            "rounds": len(self.seconds),
            "others": round(self.others, 2),
        }


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


# ---- results ---------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Hardware, versions, date and commit: what a number means nothing without."""

    def git(*words: str) -> str:
        found = subprocess.run(["git", *words], cwd=ROOT, text=True, capture_output=True)
        return found.stdout.strip()

    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    family = re.search(r"cpu family\s*: (\d+)", info.read_text()) if info.exists() else None
    dirty = " (dirty)" if git("status", "--porcelain", "--", "csrc", "lets_kernels", "benchmarks/*.py") else ""
    return {
        "cpu": found[1] if found else platform.processor() or platform.machine(),
        "cpu_family": int(family[1]) if family else None,
        "cores": os.cpu_count(),
        "threads": THREADS,
        "system": platform.platform(),
        "backend": ops.backends()["cpu"],
        "lets_kernels": lets_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": (git("rev-parse", "HEAD") or "unknown") + dirty,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


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
