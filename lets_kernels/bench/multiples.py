"""``--full``: whole training steps of SAM, of LETS and of others, as multiples of two gradients."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lets_kernels.bench.clock import LEAST_ROUNDS, Budget, Others, Timing, in_turn, threads, timings
from lets_kernels.bench.compare import Say
from lets_kernels.bench.contenders import SGD
from lets_kernels.bench.eager import PerTensor
from lets_kernels.bench.networks import Network
from lets_kernels.bench.training import RHO
from lets_kernels.learning.learned import LearnedRadius
from lets_kernels.sam import SAM

UNIT, PLAIN, OURS, LOOPED = "two gradients", "SGD", "SAM", "SAM, per-tensor loop"
#: How far off the loop's a first SAM step may be, as a share of how far off one without ε is; an ulp of the weights is
#: added, since a loss may have no curvature. Both are float32: an ε that is off by ulps makes a ĝ that is off, too.
#: 1e-4 was the most, on the language model.
TOLERANCE = 0.01
MOST_SHARE = 0.5  # of the time left: a network that needs more is left out

Closure = Callable[[], Tensor]
Step = Callable[[], object]


@dataclass(frozen=True)
class Method:
    """A way to take one training step.

    Attributes:
        make: from parameters, a closure for the training loss's gradients, and one for the validation loss's.
        first: whether its first step is SAM's with ρ = ``RHO``.
        steps: so many make a round, since not all of them cost the same.
    """

    name: str
    make: Callable[[list[Tensor], Closure, Closure], Step]
    first: bool = False
    steps: int = 1


def _unit(params: list[Tensor], closure: Closure, validation: Closure) -> Step:
    return lambda: (closure(), closure())


def _plain(params: list[Tensor], closure: Closure, validation: Closure) -> Step:
    optimizer = SGD(params)

    def step() -> None:
        closure()
        optimizer.step()

    return step


def _looped(rho: float) -> Callable[[list[Tensor], Closure, Closure], Step]:
    def make(params: list[Tensor], closure: Closure, validation: Closure) -> Step:
        stepper = PerTensor(params, SGD, rho)

        def step() -> None:
            closure()
            stepper.first_step()
            closure()
            stepper.second_step()

        return step

    return make


def _sam(rho: Callable[[], Any]) -> Callable[[list[Tensor], Closure, Closure], Step]:
    """This package's, with a radius of its own for every optimizer."""

    def make(params: list[Tensor], closure: Closure, validation: Closure) -> Step:
        options: dict[str, Any] = dict(SGD.options)
        optimizer = SAM(params, SGD.kind, rho(), **options)
        if optimizer.radius.learns:
            return lambda: optimizer.step(closure, validation)
        return lambda: optimizer.step(closure)

    return make


METHODS = (
    Method(UNIT, _unit),
    Method(PLAIN, _plain),
    Method(OURS, _sam(lambda: RHO), True),
    Method('SAM, rho="auto"', _sam(lambda: "auto")),
    Method("LETS-SAM", _sam(lambda: LearnedRadius(RHO)), True),
    Method("LETS-SAM, every tenth step", _sam(lambda: LearnedRadius(RHO, interval=10)), True, steps=10),
    Method('LETS-SAM, validation="next"', _sam(lambda: LearnedRadius(RHO, validation="next")), True),
    Method(LOOPED, _looped(RHO), True),
)


@dataclass
class Multiples:
    """The rounds of every method on one network."""

    network: str
    steps: dict[str, int] = field(default_factory=dict)  # of a round
    gradients: dict[str, float] = field(default_factory=dict)  # a step, as counted
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of each round
    refused: dict[str, str] = field(default_factory=dict)
    others: float = 0.0  # cores that other processes kept busy during the rounds
    note: str = ""  # why there are no timings, where there are none

    @property
    def timings(self) -> dict[str, Timing]:
        """Of one step; empty before the first round has ended."""
        a_step = {name: [s / self.steps[name] for s in values] for name, values in self.seconds.items()}
        return timings(a_step, self.others)

    @property
    def rounds(self) -> int:
        return min(map(len, self.seconds.values()), default=0)

    def over(self, name: str, unit: str) -> float | None:
        """How many times as long as the unit a step takes: the median over rounds; None where one is not timed."""
        found = self.timings
        return found[name].over(found[unit]) if name in found and unit in found else None


def multiples(
    networks: Sequence[Callable[[], Network]],
    budget: Budget,
    into: list[Multiples],
    share: float = 1.0,
    most: int = 15,
    say: Say = lambda text: None,
) -> None:
    """Times whole steps on each network, with ``share`` of the time that is left; float32, or the user's own dtype."""
    for done, make in enumerate(networks):
        network = make()
        say(f"multiples of two gradients, {network.name}")
        _measure(network, budget, into, share / (len(networks) - done), most)


def _measure(network: Network, budget: Budget, into: list[Multiples], share: float, most: int) -> None:
    found = Multiples(network.name)
    into.append(found)
    start = budget.used()
    with threads(1):  # which a busy machine delays least
        counted, runs = _first_steps(network, found)
    if UNIT not in runs:
        found.note = found.refused[UNIT]
        return
    warm: dict[str, list[float]] = {name: [] for name in runs}
    a_step = (budget.used() - start) / max(1, len(runs))
    a_round = a_step * sum(found.steps[name] for name in runs)  # LETS's every tenth step counts ten times
    if (1 + LEAST_ROUNDS) * a_round > MOST_SHARE * budget.left():
        found.note = "left out: it did not fit into the time that was left"
        return
    for values in counted.values():
        values.clear()
    start = budget.used()
    in_turn(runs, warm, 1, clock=time.perf_counter)
    found.gradients = {name: len(counted[name]) / found.steps[name] for name in runs}
    a_round = budget.used() - start
    rounds = budget.rounds(a_round, share, most)
    if not rounds or LEAST_ROUNDS * a_round > MOST_SHARE * budget.left():
        found.note = "left out: it did not fit into the time that was left"
        return
    end, elsewhere = budget.used() + share * budget.left(), Others()
    found.seconds = {name: [] for name in runs}
    try:
        in_turn(runs, found.seconds, rounds, lambda: budget.used() > end, time.perf_counter)
    finally:
        found.others = elsewhere.cores()


def _first_steps(network: Network, found: Multiples) -> tuple[dict[str, list[None]], dict[str, Step]]:
    """One step of every method on a copy of the network. For those that do not step elsewhere than the loop: a list
    that grows by one with each gradient, and what makes a round.
    """
    counted: dict[str, list[None]] = {}
    made: dict[str, tuple[list[Tensor], Step]] = {}
    unperturbed = Method("without ε", _looped(0.0))
    for method in (unperturbed, *METHODS):
        net, calls = copy.deepcopy(network.module), counted.setdefault(method.name, [])
        params: list[Tensor] = [p for p in net.parameters() if p.requires_grad]
        closures = [_gradient(net, params, loss, calls) for loss in (network.loss, network.validation)]
        try:
            step = method.make(params, *closures)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # the same dropout for everyone
                step()
        except Exception as failure:  # on the user's own module, say
            text = (str(failure).splitlines() or [""])[0][:60]
            found.refused[method.name] = f"does not run here: {type(failure).__name__}: {text}"
            continue
        made[method.name] = params, step
    exact = all(p.dtype in (torch.float32, torch.float64) for p in network.module.parameters())
    if exact and LOOPED in made and unperturbed.name in made:
        loop = made[LOOPED][0]
        rounding = torch.finfo(torch.float32).eps * _distance(loop, [torch.zeros_like(p) for p in loop])
        limit = TOLERANCE * _distance(made[unperturbed.name][0], loop) + rounding
        for name in [method.name for method in METHODS if method.first and method.name in made]:
            off = _distance(made[name][0], loop)
            if not off <= limit:
                found.refused[name] = f"steps elsewhere: off by {off:.1e}, more than {limit:.0e}: not timed"
                del made[name]
    made.pop(unperturbed.name, None)
    found.steps = {method.name: method.steps for method in METHODS if method.name in made}
    return counted, {name: _round(step, found.steps[name]) for name, (_, step) in made.items()}


def _gradient(
    net: torch.nn.Module, params: Sequence[Tensor], loss_of: Callable[[torch.nn.Module], Tensor], calls: list[None]
) -> Closure:
    def closure() -> Tensor:
        for p in params:
            p.grad = None
        loss = loss_of(net)
        loss.backward()
        calls.append(None)
        return loss

    return closure


def _round(step: Step, steps: int) -> Step:
    def run() -> None:
        for _ in range(steps):
            step()

    return run


def _distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The 2-norm of their difference."""
    squares = [float((a.detach() - b.detach()).double().square().sum()) for a, b in zip(some, others, strict=True)]
    return sum(squares) ** 0.5
