"""One comparison: every contender takes the same three steps, and those that step as the oracle are timed in turn."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lets_kernels import ops
from lets_kernels.bench.clock import CLOCK, LEAST_ROUNDS, Budget, Others, Timing, in_turn, threads, timings
from lets_kernels.bench.contenders import Base, Contender, Stepper
from lets_kernels.bench.memory import Memory
from lets_kernels.bench.oracle import Oracle
from lets_kernels.bench.shapes import Shape, normal, numel
from lets_kernels.sam import SAM

STEPS = 3
#: Largest error, relative to max(|weight|, rms of its tensor). float32: eager code sums the norm in float32, over
#: millions of squares, and ε is some 5 % of a weight. float64: eager code adds 1e-12 to the norm, which is 0.1 for 100
#: weights. bfloat16: weights are rounded to 8 bits at most twice a pass, three steps long, and eager code rounds the
#: norm and ε too.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps}
#: From so many elements in one tensor, n, eager float32 may be off by more: torch adds n/16 squares one after the other
#: in each lane of a vector, by which ‖g‖ may lose n/16 · 2⁻²⁴/2, and ε is at most 0.3 of a weight's scale. Ten tensors
#: of 2.56 M were off by 1.0e-5.
LONG, LOSS = 2_400_000, 0.3 * 2**-29
WEIGHT_SD, GRAD_SD = 0.02, 0.01
RADIUS = 0.05 * WEIGHT_SD  # for every √element: ε is then 5 % of the weights, and an error in it shows
MANY_ROUNDS, SHORT = 500, 3.0  # of short rounds there are more, as long as they take no longer than this, in seconds
COPY, STREAMED = "torch's copy_", "a streamed copy"

Say = Callable[[str], None]


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


@dataclass
class Result:
    """What is known of a contender. It is timed only if ``refused`` is empty."""

    contender: Contender
    error: float = math.nan  # the largest, as :func:`error` has it
    refused: str = ""
    extra_bytes: int | None = None  # at the peak of a step, beside parameters, gradients and the base's state


@dataclass
class Comparison:
    """All contenders on one set of shapes with one base optimizer."""

    base: Base
    shapes: list[Shape]
    dtype: torch.dtype
    results: dict[str, Result] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of each round; of copies, too
    others: float = 0.0  # cores that other processes kept busy during the rounds
    validation: float = 0.0  # the seconds it took
    threads: int = field(default_factory=torch.get_num_threads)
    note: str = ""  # why there are no timings, where there are none

    @property
    def numel(self) -> int:
        return numel(self.shapes)

    @property
    def tolerance(self) -> float:
        """The largest error with which a contender is timed."""
        longest = max(map(math.prod, self.shapes))
        loses = self.dtype == torch.float32 and longest > LONG
        return LOSS * longest if loses else TOLERANCES[self.dtype]

    @property
    def timings(self) -> dict[str, Timing]:
        """Of everyone who was timed, and of the copies; empty before the first round has ended."""
        return timings(self.seconds, self.others)

    @property
    def disturbed(self) -> bool:
        """Whether other processes were busier than the cores that were left: they are then in the times."""
        return self.others > Others.LIMIT + max(0, (os.cpu_count() or 1) - self.threads)

    @property
    def order(self) -> list[str]:
        """Who was timed, the fastest first."""
        found = self.timings
        return sorted((name for name in self.results if name in found), key=lambda name: found[name].median)

    def moved(self, name: str) -> int | None:
        """The bytes that the step of this contender has to move."""
        buffers = self.buffers(name)
        return None if buffers is None else buffers * self.dtype.itemsize * self.numel

    def buffers(self, name: str) -> int | None:
        """The parameter-sized reads and writes of its step."""
        contender, base = self.results[name].contender, self.base
        if contender.moved is None:
            return None
        fused = contender.fuses or base.fused(self.dtype)
        return contender.moved + (base.moved if fused else base.foreach_moved or 0)

    @property
    def copy_rate(self) -> float:
        """Bytes a second of the fastest copy of as many elements, read and written ones counted."""
        found = self.timings
        moved = 2 * self.dtype.itemsize * self.numel
        return max((moved / found[name].median for name in (COPY, STREAMED) if name in found), default=math.nan)


def compare(
    contenders: Sequence[Contender],
    base: Base,
    shapes: list[Shape],
    dtype: torch.dtype,
    budget: Budget,
    into: list[Comparison],
    share: float = 1.0,
    most: int = 50,
    say: Say = lambda text: None,
) -> Comparison:
    """Validates and times; the comparison is appended to ``into`` first, so that an interrupt leaves what there is.

    The rounds take this ``share`` of the time left in the ``budget``; there are ``most`` of them at most, or more if
    they are short. Who would leave no time for the rounds of those before takes no part.
    """
    found = Comparison(base, shapes, dtype)
    into.append(found)
    grads = [normal(shapes, GRAD_SD, seed, dtype) for seed in (1, 2)]
    title, begun = f"SAM + {base.name}", budget.used()
    with threads(1):  # which a busy machine delays least
        right = _validated(found, contenders, grads, budget, lambda text: say(f"{title}: {text}"))
    found.validation = budget.used() - begun
    runs: dict[str, Callable[[], object]] = {
        name: one_step(params, stepper, grads) for name, (params, stepper) in right.items()
    }
    if not runs:
        found.note = "nobody took the right step, so there is nothing to time"
        return found
    runs |= _copies(found.numel, dtype)
    say(f"{title}: timing {len(runs)} runs in turn")
    warm: dict[str, list[float]] = {name: [] for name in runs}
    start = budget.used()
    in_turn(runs, warm, 1)
    a_round = budget.used() - start
    if (1 + LEAST_ROUNDS) * a_round <= budget.left():  # without what the first one compiled for these threads
        start = budget.used()
        in_turn(runs, warm, 1)
        a_round = budget.used() - start
    rounds = budget.rounds(a_round, share, max(most, min(MANY_ROUNDS, int(SHORT / max(a_round, 1e-9)))))
    if not rounds:
        found.note = f"{LEAST_ROUNDS} rounds did not fit into the time that was left"
        return found
    end = budget.used() + share * budget.left()
    elsewhere = Others()
    found.seconds = {name: [] for name in runs}
    try:
        in_turn(runs, found.seconds, rounds, lambda: budget.used() > end)
    finally:
        found.others = elsewhere.cores()
    return found


def one_step(params: list[Tensor], stepper: Stepper, grads: Sequence[Sequence[Tensor]]) -> Callable[[], None]:
    """A whole step outside forward and backward: the gradients are put in place while the clock is stopped."""

    def run() -> None:
        for given, half in zip(grads, (stepper.first_step, stepper.second_step), strict=True):
            with CLOCK.stopped():
                give(params, given)
            half()

    return run


def once(params: list[Tensor], stepper: Stepper) -> None:
    """A step with gradients of one."""
    one_step(params, stepper, [[torch.ones_like(p) for p in params]] * 2)()


def give(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g


def _validated(
    found: Comparison, contenders: Sequence[Contender], grads: list[list[Tensor]], budget: Budget, say: Say
) -> dict[str, tuple[list[Tensor], Stepper]]:
    """Who takes three steps as the oracle: compared are the weights at θ + ε of the last, and after it."""
    rho, tolerance = RADIUS * math.sqrt(found.numel), found.tolerance
    start = normal(found.shapes, WEIGHT_SD, 0, found.dtype)
    say("validating: float64")
    oracle = Oracle(start, found.base, rho)
    for _ in range(STEPS - 1):
        oracle.step(grads[1])
    expected = [oracle.perturbed(grads[0])]
    oracle.step(grads[1])
    expected.append(oracle.theta)
    del oracle  # its momenta, which growth has no memory for
    right: dict[str, tuple[list[Tensor], Stepper]] = {}
    longest = 0.0  # of one contender, which its first round and the least number of others cost once more
    for contender in contenders:
        if found.base.name not in contender.bases:
            continue
        say(f"validating: {contender.name}")
        result = found.results[contender.name] = Result(contender)
        begun = budget.used()
        if longest * (len(right) + 2) > budget.left():
            result.refused = "left out: it did not fit into the time that was left"
            continue
        params = [p.clone().requires_grad_() for p in start]
        try:
            stepper = _three_steps(result, params, found, rho, grads, expected)
        except Exception as failure:  # a package that does not go with this torch, say
            text = (str(failure).splitlines() or [""])[0][:60]
            result.refused = f"does not run here: {type(failure).__name__}: {text}"
            continue
        longest = max(longest, budget.used() - begun)
        if result.error <= tolerance:
            right[contender.name] = params, stepper
        else:
            result.refused = f"steps elsewhere: off by {result.error:.1e}, more than {tolerance:.0e}: not timed"
    return right


def _three_steps(
    result: Result,
    params: list[Tensor],
    found: Comparison,
    rho: float,
    grads: list[list[Tensor]],
    expected: list[list[Tensor]],
) -> Stepper:
    """Fills in the error and the memory; the contender."""
    small = [p.detach()[..., :1].clone().requires_grad_() for p in params[:1]]
    once(small, result.contender.make(small, found.base, rho))  # what is loaded at the first step is no one's memory
    memory = Memory(found.dtype.itemsize * found.numel)
    stepper = result.contender.make(params, found.base, rho)
    errors = []
    for step in range(STEPS):
        if step == 1:
            memory.reset()
        give(params, grads[0])
        stepper.first_step()
        if step == STEPS - 1:
            errors.append(error(params, expected[0]))
        give(params, grads[1])
        stepper.second_step()
        if step == 1:
            result.extra_bytes = memory.peak(_state_bytes(stepper))
    errors.append(error(params, expected[1]))
    result.error = max(errors)
    if isinstance(stepper, SAM) and not stepper.fused:
        raise RuntimeError(f"not fused: {stepper.fused_reason}")
    return stepper


def _state_bytes(stepper: Any) -> int:
    """Of the base optimizer's state."""
    base = getattr(stepper, "base_optimizer", None) or getattr(stepper, "base", None)
    state = base.state if base is not None else {"": dict(enumerate(getattr(stepper, "momenta", [])))}
    return sum(x.nbytes for entry in state.values() for x in entry.values() if isinstance(x, Tensor))


def _copies(count: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Copies of as many elements: torch's, and where kernels are compiled one that writes past the caches."""
    source, target = torch.ones(count, dtype=dtype), torch.empty(count, dtype=dtype)
    copies: dict[str, Callable[[], object]] = {COPY: lambda: target.copy_(source)}
    native, _ = ops.load("cpu")
    if native is None:
        return copies
    dirty, table = torch.ones((), dtype=torch.int64), torch.tensor([[0, count, -1, 0, 0]])

    def streamed() -> None:
        dirty.fill_(1)
        native.restore_([target], source, dirty, table)

    return {**copies, STREAMED: streamed}
