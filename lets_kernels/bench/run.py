"""All of it in the time there is: the comparisons, whole training steps, and with ``--full`` multiples and growth."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lets_kernels.bench.clock import Budget
from lets_kernels.bench.compare import Comparison, Say, compare
from lets_kernels.bench.contenders import ADAMW, DEFAULT, LOOP, SGD, Contender
from lets_kernels.bench.growth import Growth, growth
from lets_kernels.bench.multiples import Multiples, multiples
from lets_kernels.bench.networks import networks
from lets_kernels.bench.own import Own
from lets_kernels.bench.shapes import Shape, normal, numel
from lets_kernels.bench.training import Training, train
from lets_kernels.step.precision import PrecisionWarning

ROUNDS = 30
LEAST_LEFT = 1.5  # times what the first validation took: with less time, the second comparison is left out


@dataclass(frozen=True)
class Settings:
    """What is asked for: the parameters' shapes and dtype, and the time."""

    model: str
    shapes: list[Shape]
    dtype: torch.dtype
    threads: int
    seconds: float
    full: bool = False
    own: Own | None = None


@dataclass
class Findings:
    """What has been measured so far."""

    comparisons: list[Comparison] = field(default_factory=list)
    training: list[Training] = field(default_factory=list)
    multiples: list[Multiples] = field(default_factory=list)
    growth: Growth = field(default_factory=Growth)
    left_out: list[str] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0


def measure(
    settings: Settings, contenders: Sequence[Contender], found: Findings, budget: Budget, say: Say = lambda text: None
) -> None:
    """Fills ``found``. After Ctrl-C it holds what had been measured by then, and says so."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PrecisionWarning)  # what 16-bit weights lose is no question of speed
            _measure(settings, contenders, found, budget, say)
    except KeyboardInterrupt:
        found.interrupted = True
    found.seconds = budget.used()


def _measure(settings: Settings, contenders: Sequence[Contender], found: Findings, budget: Budget, say: Say) -> None:
    slices = (0.2, 0.25) if settings.full else (0.4, 0.55)  # of the time left; the rest is for what comes after
    validation = 0.0
    for base, share in zip((SGD, ADAMW), slices, strict=True):
        if budget.left() < LEAST_LEFT * validation:
            found.left_out.append(f"SAM + {base.name} is left out: it does not fit into {settings.seconds:.0f} s")
            continue
        one = compare(contenders, base, settings.shapes, settings.dtype, budget, found.comparisons, share, ROUNDS, say)
        validation = one.validation
    first = found.comparisons[0]
    right = first.order or [name for name, result in first.results.items() if not result.refused]
    eager = next((name for name in right if not first.results[name].contender.ours and name != LOOP), None)
    racing = [c for c in contenders if c.name in (DEFAULT, LOOP, eager) and c.name in right]
    if racing and budget.left() > 0:
        say("whole training steps")
        network = networks(settings.own)[0]()
        train(racing, SGD, network, budget, found.training, 0.15 if settings.full else 0.8)
    else:
        found.left_out.append("Whole training steps are left out: there was no time left for them")
    if settings.full:
        multiples(networks(settings.own), budget, found.multiples, 0.3, say=say)
        growth(settings.dtype, budget, found.growth, found.left_out, say)


def expected(settings: Settings, contenders: int, copy_rate: float, draw: float) -> float:
    """About how many seconds it will take, at most ``settings.seconds``.

    ``copy_rate`` is that of :func:`probe`, in bytes a second, and ``draw`` its seconds to draw a normal number.
    """
    elements, itemsize = numel(settings.shapes), settings.dtype.itemsize
    step = 15 * elements * itemsize / copy_rate  # about what a step moves
    checks = 2 * 60 * elements / copy_rate  # two comparisons in float64
    validation = contenders * (3 * step + checks) + 3 * draw * elements + 3 * 12 * 8 * elements / copy_rate
    rounds = ROUNDS * contenders * step
    total = len((SGD, ADAMW)) * (validation + rounds) + 10.0
    return settings.seconds if settings.full else min(total, settings.seconds)


def probe() -> tuple[float, float]:
    """The two rates that :func:`expected` wants, in a tenth of a second."""
    count = 4_000_000
    source, target = torch.ones(count), torch.empty(count)
    copying = min(_seconds(lambda: target.copy_(source)) for _ in range(3))
    drawing = _seconds(lambda: normal([(count // 8,)], 1.0, 0))
    return 2 * source.nbytes / copying, drawing / (count // 8)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def needed_bytes(settings: Settings, contenders: int) -> int:
    """Of memory: of the parameters, for each contender θ, what it saves, and AdamW's moments; and of the oracle."""
    elements, itemsize = numel(settings.shapes), settings.dtype.itemsize
    return elements * (itemsize * (4 * contenders + 3) + 8 * 4)
