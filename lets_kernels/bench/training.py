"""Whole training steps: two gradients of a real network and the optimizer's work, and what share that is."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from lets_kernels.bench.clock import Budget, in_turn
from lets_kernels.bench.contenders import Base, Contender
from lets_kernels.bench.networks import Network

RHO = 0.05


@dataclass
class Training:
    """Seconds of every round: of the whole step, and of it outside forward and backward."""

    network: str
    whole: dict[str, list[float]] = field(default_factory=dict)
    outside: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    def rows(self) -> dict[str, tuple[float, float]]:
        """For each contender its whole step, in seconds, and the share of it that is outside forward and backward.

        The gradients are the same work for everyone, so theirs is one median, over all rounds of all contenders.
        """
        rounds = min(map(len, self.whole.values()), default=0)
        if not rounds:
            return {}
        pairs = [(name, self.whole[name][i], self.outside[name][i]) for name in self.whole for i in range(rounds)]
        gradients = statistics.median(whole - outside for _, whole, outside in pairs)
        steps = {name: statistics.median(self.outside[name][:rounds]) for name in self.whole}
        return {name: (gradients + step, step / (gradients + step)) for name, step in steps.items()}


def train(
    contenders: Sequence[Contender],
    base: Base,
    network: Network,
    budget: Budget,
    into: list[Training],
    share: float = 1.0,
    most: int = 15,
) -> Training:
    """Times whole steps in turn, each contender on a copy of the network; float32, or as the user's module has it."""
    found = Training(network.name)
    into.append(found)
    found.outside = {c.name: [] for c in contenders}
    runs = {
        c.name: _step(c, base, copy.deepcopy(network.module), network.loss, found.outside[c.name]) for c in contenders
    }
    start = budget.used()
    in_turn(runs, {name: [] for name in runs}, 1)
    rounds = budget.rounds(budget.used() - start, share, most)
    for values in found.outside.values():
        values.clear()
    if not rounds:
        found.note = "left out: it did not fit into the time that was left"
        return found
    end = budget.used() + share * budget.left()
    found.whole = {name: [] for name in runs}
    in_turn(runs, found.whole, rounds, lambda: budget.used() > end, time.perf_counter)
    return found


def _step(
    contender: Contender, base: Base, net: nn.Module, loss_of: Callable[[nn.Module], Tensor], outside: list[float]
) -> Callable[[], None]:
    params: list[Tensor] = [p for p in net.parameters() if p.requires_grad]
    stepper = contender.make(params, base, RHO)

    def gradient() -> None:
        for p in params:
            p.grad = None
        loss_of(net).backward()

    def run() -> None:
        seconds = 0.0
        for half in (stepper.first_step, stepper.second_step):
            gradient()
            start = time.perf_counter()
            half()
            seconds += time.perf_counter() - start
        outside.append(seconds)

    return run
